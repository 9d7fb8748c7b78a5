"""The plots of a study: names of files, titles and captions."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prealign.evaluation.plots import save_png
from megatron_prealign.study import curves
from megatron_prealign.study.definition import sweep_file
from megatron_prealign.study.records import StudyRecords
from megatron_prealign.study.sweeps import draw_sweep
from megatron_prealign.study.tables import baseline_name
from megatron_prealign.study.trade_off import draw_trade_off

DIRECTORY = "plots"
LOSS, BY_LAYER, HELD_OUT, TRADE_OFF = "loss-over-tokens", "retrieval-by-layer", "trained-and-held-out", "trade-off"
_BANDS = "Mean over seeds, with a band of one standard deviation."


@dataclass(frozen=True)
class Plot:
    """A plot of a study."""

    name: str
    """Stem of its file."""
    title: str
    caption: str
    png: bytes
    sweep: str | None = None
    """Sweep that it is of."""


def draw_plots(records: StudyRecords) -> list[Plot]:
    """Draws all plots that the complete jobs have data for."""
    study = records.study
    plots = []
    for name, title, caption, figure, sweep in _figures(records):
        if figure is not None:
            drawn = study.runs if sweep is None else study.sweeps[sweep]
            caption += _missing_seeds(records, [run.name for run in drawn])
            buffer = io.BytesIO()
            save_png(figure, buffer)
            plots.append(Plot(name, title, caption, buffer.getvalue(), sweep))
    return plots


def _figures(records: StudyRecords) -> Iterator[tuple[str, str, str, Any, str | None]]:
    study, rows = records.study, records.rows
    yield (
        LOSS,
        "Validation loss during training",
        f"Loss on held-out text of each language. {_BANDS} The y range is fitted to the values after "
        f"the first {curves.LATE:.0%} of the tokens.",
        curves.draw_losses(records),
        None,
    )
    source = (
        f"Alignment watch, {_watched_words(records)} words, mean over both directions of all language pairs"
        if curves.uses_watch(records)
        else "Evaluations, trained words, mean over language pairs"
    )
    yield (
        BY_LAYER,
        "Word retrieval during training, by layer",
        f"Fraction of words whose nearest neighbour in the other language is a translation. {source}. {_BANDS}",
        curves.draw_by_layer(records),
        None,
    )
    yield (
        HELD_OUT,
        "Trained and held-out words during training",
        "P@1 of words that alignment and code-switching may use, and of words whose dictionary entries were held out; "
        f"mean over layers and language pairs, from the evaluations. {_BANDS} Compare runs, not the two panels: the "
        "held-out words are fewer.",
        curves.draw_trained_and_held_out(records),
        None,
    )
    yield (
        TRADE_OFF,
        "Loss against word retrieval",
        "End of training: loss of the language that words are retrieved in, against P@1 of trained words, mean over "
        "layers. Mean over seeds, with bars of one standard deviation.",
        draw_trade_off(study, rows),
        None,
    )
    for name in study.sweeps:
        baseline = baseline_name(study, [run.name for run in study.sweeps[name]])
        caption = f"Mean over seeds, with bars of one standard deviation. Grey: {baseline}."
        yield sweep_file(name), f"Loss and word retrieval over {name}", caption, draw_sweep(study, name, rows), name


def _missing_seeds(records: StudyRecords, runs: Sequence[str]) -> str:
    """Sentence about the runs that lack seeds, with a space before it; empty if none does."""
    found = [f"{run}{missing}" for run in runs if (missing := records.missing_seeds(run))]
    return f" Not all seeds: {', '.join(found)}." if found else ""


def _watched_words(records: StudyRecords) -> str:
    kinds = {point.groups for each in records.complete for point in each.record.watch}
    return " or ".join(kind.replace("_", "-") for kind in sorted(kinds))


def stale_files(output: Path, plots: list[Plot]) -> list[Path]:
    """Plots in the directory of the study that earlier tables had and these do not."""
    written = {f"{plot.name}.png" for plot in plots}
    known = {f"{name}.png" for name in (LOSS, BY_LAYER, HELD_OUT, TRADE_OFF)}
    return [
        path
        for path in sorted((output / DIRECTORY).glob("*.png"))
        if path.name not in written and (path.name in known or path.name.startswith("sweep-"))
    ]
