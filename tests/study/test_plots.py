"""Plots of a study: readable with 13 runs, and labelled without overlaps."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.text import Annotation, Text
from support.study_records import evaluation, many_runs, records_of, study_of

from megatron_prealign.study import plots
from megatron_prealign.study.curves import draw_losses
from megatron_prealign.study.definition import StudyRun
from megatron_prealign.study.results import P_AT_1, Row
from megatron_prealign.study.trade_off import draw_trade_off, target_pairs


def boxes(texts: list[Any]) -> list[Any]:
    for text in texts:
        text.get_window_extent()
    return [Text.get_window_extent(text) for text in texts]


def test_labels_are_not_cut_and_the_legend_is_outside(tmp_path: Path) -> None:
    figures = [(name, figure) for name, _, _, figure, _ in plots._figures(many_runs(tmp_path))]
    assert [name for name, _ in figures] == [
        *("loss-over-tokens", "retrieval-by-layer", "trained-and-held-out", "trade-off", "sweep-guard-interval"),
    ]
    for name, figure in figures:
        figure.canvas.draw()
        page = figure.bbox
        axes = [axis for axis in figure.axes if axis.get_visible()]
        texts = [text for axis in axes for text in (axis.xaxis.label, axis.yaxis.label, axis._left_title)]
        texts += [text for axis in axes for text in axis.texts]
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        for text, box in zip(texts, boxes(texts), strict=True):
            inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
            assert inside, f"{name}: {text.get_text()} is cut"
        for legend in figure.legends:
            assert not any(legend.get_window_extent().overlaps(axis.get_window_extent()) for axis in axes), name


def test_every_run_has_a_label_that_overlaps_no_other(tmp_path: Path) -> None:
    records = many_runs(tmp_path)
    figure = draw_trade_off(records.study, records.rows)
    assert figure is not None
    (axis,) = figure.axes
    labels = [text for text in axis.texts if isinstance(text, Annotation)]
    assert sorted(text.get_text() for text in labels) == sorted(run.name for run in records.study.runs)
    figure.canvas.draw()
    places = boxes(labels)
    assert not [(a, b) for number, a in enumerate(places) for b in places[:number] if a.overlaps(b)]


def test_a_trade_off_per_target_language(tmp_path: Path) -> None:
    rows = [Row("a", 1, "validation_loss", language, "", 1.0) for language in ("en", "de", "fr")]
    rows += [Row("a", 1, P_AT_1, pair, "emb", 0.5) for pair in ("en-de", "en-fr")]
    assert target_pairs(rows) == {"de": ["en-de"], "fr": ["en-fr"]}
    study = study_of(tmp_path, [StudyRun(name="a"), StudyRun(name="lost")])
    figure = draw_trade_off(study, rows)
    assert figure is not None
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Trade-off: de", "Trade-off: fr"]
    assert draw_trade_off(study, [row for row in rows if row.metric != P_AT_1]) is None


def test_plots_without_data_are_left_out(tmp_path: Path) -> None:
    records = records_of(study_of(tmp_path, [StudyRun(name="a")]), {("a", 1): [evaluation(9, {"en": 1.0})]})
    (plot,) = plots.draw_plots(records)
    assert (plot.name, plot.sweep, plot.png[:4]) == ("loss-over-tokens", None, b"\x89PNG")


def test_missing_seeds_are_marked(tmp_path: Path) -> None:
    runs = [StudyRun(name="a", at={"x": 1.0}), StudyRun(name="b", at={"x": 2.0}), StudyRun(name="c")]
    metrics = {key: [evaluation(9, {"en": 1.0})] for key in (("a", 1), ("a", 2), ("b", 2), ("c", 1))}
    records = records_of(study_of(tmp_path, runs), metrics)
    loss, sweep = plots.draw_plots(records)
    assert loss.caption.endswith("Not all seeds: b (1 of 2 seeds), c (1 of 2 seeds).")
    assert sweep.caption.endswith("Not all seeds: b (1 of 2 seeds).")
    figure = draw_losses(records)
    assert figure is not None
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["a", "b (1 of 2 seeds)", "c (1 of 2 seeds)"]
    complete = records_of(study_of(tmp_path, [StudyRun(name="a")]), {key: metrics[key] for key in (("a", 1), ("a", 2))})
    assert "seeds:" not in plots.draw_plots(complete)[0].caption


@pytest.mark.parametrize(
    ("name", "stale"),
    [("trade-off.png", True), ("sweep-old.png", True), ("loss-over-tokens.png", False), ("mine.png", False)],
)
def test_stale_plots(tmp_path: Path, name: str, stale: bool) -> None:
    directory = tmp_path / plots.DIRECTORY
    directory.mkdir()
    (directory / name).touch()
    written = [plots.Plot("loss-over-tokens", "", "", b"")]
    assert plots.stale_files(tmp_path, written) == ([directory / name] if stale else [])
