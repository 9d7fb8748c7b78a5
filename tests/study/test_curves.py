"""Curves over tokens: seeds are joined by hand, 13 runs stay distinguishable."""

import math
from pathlib import Path

import pytest
from support.study_records import LAYERS, evaluation, many_runs, records_of, study_of, watch

from megatron_prealign.study import curves
from megatron_prealign.study.curves import Point, mean_curves, run_styles
from megatron_prealign.study.definition import StudyRun


def points(*values: tuple[str, int, float]) -> list[Point]:
    return [Point(phase, tokens, {"en": value}) for phase, tokens, value in values]


def test_seeds_are_joined_within_their_phase_and_at_its_end() -> None:
    one = points(("alignment", 90, 7.0), ("lm", 200, 6.0), ("lm", 300, 5.0), ("lm", 390, 4.0))
    # Its alignment ended earlier, and it had one evaluation less before its end.
    other = points(("alignment", 110, 8.0), ("lm", 220, 6.5), ("lm", 410, 4.5))
    joined = mean_curves([one, other])["en"]
    assert [(tokens, mean) for tokens, mean, _ in joined] == [(100, 7.5), (210, 6.25), (400, 4.25)]
    assert joined[0][2] == pytest.approx(math.sqrt(0.5))
    assert mean_curves([one])["en"] == [(90, 7.0, 0.0), (200, 6.0, 0.0), (300, 5.0, 0.0), (390, 4.0, 0.0)]
    assert mean_curves([]) == {}


def test_what_a_seed_has_not_measured_has_no_point() -> None:
    one = points(("lm", 1, 1.0), ("lm", 2, math.nan))
    other = [Point("lm", 1, {"de": 1.0}), Point("lm", 2, {"en": 1.0})]
    assert mean_curves([one, other]) == {}


def test_thirteen_runs_have_colours_and_markers_of_their_own() -> None:
    styles = run_styles([f"run{number}" for number in range(13)]).values()
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == 13
    more = run_styles([f"run{number}" for number in range(30)]).values()
    assert len({tuple(style.values()) for style in more}) == 30


def test_a_line_per_run_in_every_panel(tmp_path: Path) -> None:
    records = many_runs(tmp_path)
    losses, layers, words = (
        draw(records) for draw in (curves.draw_losses, curves.draw_by_layer, curves.draw_trained_and_held_out)
    )
    assert losses is not None and layers is not None and words is not None
    assert [axis.get_title(loc="left") for axis in losses.axes] == ["Validation loss: en", "Validation loss: de"]
    assert [axis.get_title(loc="left") for axis in words.axes] == ["P@1 of trained words", "P@1 of held-out words"]
    shown = [axis for axis in layers.axes if axis.get_visible()]
    assert [axis.get_title(loc="left") for axis in shown] == [f"Layer {name}" for name in ("emb", 1, 2, 3, "out")]
    for figure in (losses, layers, words):
        assert {len(axis.lines) for axis in figure.axes if axis.get_visible()} == {13}
    # Mean over seeds: 0.9 + 0.002 at the end, and half of it for held-out words.
    assert words.axes[0].lines[0].get_ydata()[-1] == pytest.approx(0.902)
    assert words.axes[1].lines[0].get_ydata()[-1] == pytest.approx(0.451)


def test_by_layer_from_the_watch_or_the_evaluations(tmp_path: Path) -> None:
    study = study_of(tmp_path, [StudyRun(name="a"), StudyRun(name="b")])
    watched = [watch(0, 0.1), watch(500, 0.2), evaluation(500, {"en": 1.0}, 0.7)]
    records = records_of(study, {("a", 1): watched, ("b", 1): watched})
    assert curves.uses_watch(records)
    figure = curves.draw_by_layer(records)
    assert figure is not None and list(figure.axes[0].lines[0].get_ydata()) == [0.1, 0.2]
    # The other run has no watch: only the evaluations compare.
    records = records_of(study, {("a", 1): watched, ("b", 1): watched[-1:]})
    assert not curves.uses_watch(records)
    figure = curves.draw_by_layer(records)
    assert figure is not None and list(figure.axes[0].lines[0].get_ydata()) == [0.7]
    # A run without a dictionary has no line either way.
    records = records_of(study, {("a", 1): watched, ("b", 1): [evaluation(500, {"en": 1.0})]})
    assert curves.uses_watch(records)


def test_deep_models_show_some_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "MOST_LAYERS", 3)
    figure = curves.draw_by_layer(many_runs(tmp_path, 2))
    assert LAYERS == 5 and figure is not None
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Layer emb", "Layer 2", "Layer out"]


def test_every_language_has_a_panel(tmp_path: Path) -> None:
    losses = {f"l{number}": float(number) for number in range(curves.MOST_LAYERS + 2)}
    records = records_of(study_of(tmp_path, [StudyRun(name="a")]), {("a", 1): [evaluation(9, losses)]})
    figure = curves.draw_losses(records)
    assert figure is not None
    assert [axis.get_title(loc="left").rpartition(" ")[2] for axis in figure.axes] == list(losses)


def test_nothing_measured_is_no_plot(tmp_path: Path) -> None:
    records = records_of(study_of(tmp_path, [StudyRun(name="a")]), {("a", 1): [evaluation(9, {"en": 1.0})]})
    assert curves.draw_losses(records) is not None
    assert curves.draw_by_layer(records) is None and curves.draw_trained_and_held_out(records) is None
    assert curves.draw_losses(records_of(study_of(tmp_path, [StudyRun(name="a")]), {})) is None
