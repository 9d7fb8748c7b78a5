"""Sweeps of a study: a table and a plot of loss and word retrieval over the value that the runs differ in."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_prealign.evaluation.plots import MUTED, RUN_COLOURS, add_legend, new_figure, plot_style
from megatron_prealign.study.definition import Study, number
from megatron_prealign.study.results import (
    HELD_OUT,
    LOSS,
    P_AT_1,
    Row,
    SeedValues,
    by_seed,
    mean_over_names,
    names_of,
    spread,
)
from megatron_prealign.study.tables import Table, baseline_name, cell, difference_cell
from megatron_prealign.text import shorten

_LOG_SPAN = 20
"""Largest over smallest value from which on an axis of positive values is logarithmic."""
_TITLE_LENGTH = 28
_CHARACTER_WIDTH = 0.09
"""Of a digit of a label of the axis, in inches."""
_WIDTHS = {1: 6.0, 2: 5.2, 3: 3.47}
"""Columns of panels -> width of a panel, in inches."""
_TRAINED = {"color": RUN_COLOURS[0], "marker": "o", "linestyle": "-"}
_HELD_OUT = {"color": RUN_COLOURS[1], "marker": "s", "linestyle": "--"}


def sweep_table(study: Study, name: str, rows: Sequence[Row]) -> Table:
    """Table of a sweep, ordered by value: losses, word retrieval, and differences of loss."""
    languages = names_of(rows, LOSS)
    baseline = baseline_name(study, [run.name for run in study.sweeps[name]])
    losses = by_seed(rows, LOSS)
    retrieval = {
        title: values
        for title, metric in (("P@1, trained words", P_AT_1), ("P@1, held-out words", HELD_OUT))
        if (values := mean_over_names(rows, metric))
    }
    controls = {run.name: run.control for run in study.sweeps[name] if run.control is not None}
    header = ["value", "run", *(f"loss {language}" for language in languages), *retrieval]
    header += [f"{language} against {baseline}" for language in languages]
    header += [f"{language} against control" for language in languages] if controls else []
    lines = []
    for run in study.sweeps[name]:
        own = [losses.get((run.name, language), {}) for language in languages]
        line = [number(run.at[name]), run.name, *(cell(study, values) for values in own)]
        line += [cell(study, values.get(run.name)) for values in retrieval.values()]
        for other in (study.baselines.get(run.name), *([controls.get(run.name)] if controls else [])):
            line += [
                "-" if other in (None, run.name) else difference_cell(study, values, losses.get((other, language), {}))
                for values, language in zip(own, languages, strict=True)
            ]
        lines.append(line)
    caption = (
        "Ordered by value. P@1 is the mean over layers and language pairs; the last columns are differences of loss, "
        "taken seed by seed."
    )
    return Table(f"Sweep: {name}", caption, header, lines)


def draw_sweep(study: Study, name: str, rows: Sequence[Row]) -> Any | None:
    """Draws a panel of loss per language and one of P@1 over the value of a sweep; None if no run has results.

    Points have a bar of one standard deviation. The run that differences are taken from is a horizontal line; runs with
    baselines of their own have a curve of these.
    """
    runs, losses = study.sweeps[name], by_seed(rows, LOSS)
    languages = [each for each in names_of(rows, LOSS) if any((run.name, each) in losses for run in runs)]
    retrieval = [mean_over_names(rows, metric) for metric in (P_AT_1, HELD_OUT)]
    measured = any(run.name in values for values in retrieval for run in runs)
    if not languages and not measured:
        return None
    baseline = baseline_name(study, [run.name for run in runs])
    with plot_style():
        panels = len(languages) + measured
        columns = min(panels, 2 if panels == 4 else 3)
        figure, axes = new_figure(panels, columns=columns, panel_width=_WIDTHS[columns], height=3.4)
        # Less the labels of the y axis and the margins inside the axes.
        room = 0.9 * (_WIDTHS[columns] - 0.8)
        for axis, language in zip(axes, languages, strict=False):
            curve = {run.name: losses.get((run.name, language), {}) for run in runs}
            level = {run.name: losses.get((study.baselines.get(run.name, run.name), language), {}) for run in runs}
            _draw(axis, study, name, curve, level, _TRAINED)
            axis.set_title(shorten(f"Validation loss: {language}", _TITLE_LENGTH))
            axis.set_ylabel("nats per token")
            _value_axis(axis, name, [run.at[name] for run in runs], room)
        entries: dict[str, dict[str, Any]] = {f"sweep: {name}": _TRAINED}
        if measured:
            for values, style in zip(retrieval, (_TRAINED, _HELD_OUT), strict=True):
                level = {run.name: values.get(study.baselines.get(run.name, run.name), {}) for run in runs}
                _draw(axes[-1], study, name, values, level, style)
            axes[-1].set_title("Word retrieval")
            axes[-1].set_ylabel("P@1, mean over layers")
            axes[-1].set_ylim(-0.03, 1.03)
            _value_axis(axes[-1], name, [run.at[name] for run in runs], room)
            if any(run.name in retrieval[1] for run in runs):
                entries["held-out words"] = _HELD_OUT
        entries[baseline] = {"color": MUTED, "linestyle": "-", "linewidth": 1.2}
        add_legend(figure, entries)
    return figure


def _draw(
    axis: Any,
    study: Study,
    name: str,
    values: Mapping[str, SeedValues],
    levels: Mapping[str, SeedValues],
    style: dict[str, Any],
) -> None:
    """Draws a curve, and the level of the baseline or a curve of the baselines."""
    runs = study.sweeps[name]
    _draw_curve(axis, [(run.at[name], values.get(run.name)) for run in runs], style)
    grey = {"color": MUTED, "linestyle": style["linestyle"], "linewidth": 1.2}
    if len({study.baselines[run.name] for run in runs if run.name in study.baselines}) > 1:
        _draw_curve(axis, [(run.at[name], levels[run.name]) for run in runs], {**grey, "marker": style["marker"]})
        return
    found = next((levels[run.name] for run in runs if run.name in study.baselines), None)
    if found:
        level = spread(list(found.values()))
        axis.axhline(level.mean, **grey)
        if level.seeds > 1:
            low, high = level.mean - level.deviation, level.mean + level.deviation
            axis.axhspan(low, high, color=MUTED, alpha=0.15, linewidth=0)


def _draw_curve(axis: Any, points: Sequence[tuple[float, SeedValues | None]], style: dict[str, Any]) -> None:
    found = [(x, spread(list(values.values()))) for x, values in points if values]
    if found:
        bars = [point.deviation if point.seeds > 1 else 0.0 for _, point in found]
        axis.errorbar(
            [x for x, _ in found], [point.mean for _, point in found], bars, capsize=3, elinewidth=1.1, **style
        )


def _value_axis(axis: Any, name: str, values: Sequence[float], width_in: float) -> None:
    """Labels the axis of a sweep at the values of its runs."""
    from matplotlib.ticker import FixedLocator, NullLocator

    if is_logarithmic(values):
        axis.set_xscale("log")
    axis.set_xlabel(shorten(name, _TITLE_LENGTH))
    axis.xaxis.set_major_locator(FixedLocator(labelled_values(values, width_in)))
    axis.xaxis.set_major_formatter(lambda value, _position: number(value))
    axis.xaxis.set_minor_locator(NullLocator())


def labelled_values(values: Sequence[float], width_in: float) -> list[float]:
    """The values whose labels fit next to each other on an axis.

    Args:
        values: In ascending order.
        width_in: Distance of the first and the last value on the axis, in inches.
    """
    scaled = [math.log(value) if is_logarithmic(values) else value for value in values]
    places = [width_in * (each - scaled[0]) / (scaled[-1] - scaled[0]) for each in scaled]
    kept: list[tuple[float, float, float]] = []
    for value, place in zip(values, places, strict=True):
        half = _CHARACTER_WIDTH * (len(number(value)) + 1) / 2
        if not kept or place - half >= kept[-1][1] + kept[-1][2]:
            kept.append((value, place, half))
    return [value for value, _, _ in kept]


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether the axis of these values is logarithmic: all are positive, and they span more than a factor of 20."""
    return min(values) > 0 and max(values) > _LOG_SPAN * min(values)
