"""Curves of a study over tokens: mean and standard deviation over seeds, a line per run."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_prealign.evaluation.plots import (
    MAX_TITLE_LENGTH,
    RUN_COLOURS,
    add_legend,
    fit_late_values,
    layer_names,
    mean_over_pairs,
    new_figure,
    plot_style,
    tokens_axis,
)
from megatron_prealign.evaluation.retrieval_metrics import mean
from megatron_prealign.evaluation.run_record import RunRecord
from megatron_prealign.study.records import StudyRecords
from megatron_prealign.text import shorten

MOST_LAYERS = 12
"""Panels of the plot by layer; of a deeper model, layers at equal distances."""
LATE = 0.4
"""Fraction of the tokens after which values determine the y range of losses: an alignment phase ends high."""
# As many as markers; those after the colours of reports are as dark.
_COLOURS = (*RUN_COLOURS, "#c1121f", "#1f2328", "#0b8a8a", "#4d7c0f", "#5165c4", "#7f4f24")
_MARKERS = "os^DvP*X<>hdp8"
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Point:
    """What was measured at one point of training."""

    phase: str
    tokens: int
    values: Mapping[str, float]
    """Series (a panel of a plot) -> value."""


# Series -> [(tokens, mean, standard deviation)]
Curves = dict[str, list[tuple[float, float, float]]]


def run_styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and dashes of each run; 14 have the same dashes."""
    return {
        name: {
            "color": _COLOURS[index % len(_COLOURS)],
            "marker": _MARKERS[index % len(_MARKERS)],
            "linestyle": _DASHES[index // len(_COLOURS) % len(_DASHES)],
        }
        for index, name in enumerate(names)
    }


def losses(record: RunRecord) -> list[Point]:
    """Validation loss per language, at each evaluation."""
    return [Point(each.phase, each.tokens, each.validation_loss) for each in record.evaluations]


def trained_and_held_out(record: RunRecord) -> list[Point]:
    """P@1 of trained and of held-out words, mean over layers and pairs, at each evaluation."""
    points = []
    for each in record.evaluations:
        by_words = {"trained words": each.word_retrieval_p_at_1, "held-out words": each.word_retrieval_p_at_1_held_out}
        means = {name: mean(mean_over_pairs(by_pair)) for name, by_pair in by_words.items()}
        values = {name: value for name, value in means.items() if value is not None}
        points.append(Point(each.phase, each.tokens, values))
    return points


def by_layer(record: RunRecord) -> list[Point]:
    """P@1 of trained words by layer, mean over pairs, at each evaluation."""
    return [
        Point(each.phase, each.tokens, _named(mean_over_pairs(each.word_retrieval_p_at_1)))
        for each in record.evaluations
    ]


def watched_by_layer(record: RunRecord) -> list[Point]:
    """P@1 of the alignment watch by layer, mean over both directions of all pairs."""
    return [Point(each.phase, each.tokens, _named(each.by_layer("p_at_1"))) for each in record.watch]


def _named(layers: Sequence[float]) -> dict[str, float]:
    return dict(zip(layer_names(len(layers)), layers, strict=True))


def mean_curves(points_of_seeds: Sequence[Sequence[Point]]) -> Curves:
    """Joins the points of all seeds of a run.

    Seeds are joined at the same number of measurements since their phase began, and at the last one of the phase: the
    tokens of a step with words, and so the number of steps, differ a little by seed. A point is at the mean of the
    tokens. What a seed has not measured, or not as a finite value, has no point.
    """
    keyed = [_keyed(points) for points in points_of_seeds]
    curves: Curves = {}
    for key in keyed[0] if keyed else ():
        found = [points[key] for points in keyed if key in points]
        if len(found) < len(keyed):
            continue
        for name in found[0].values:
            values = [point.values.get(name, math.nan) for point in found]
            if all(map(math.isfinite, values)):
                deviation = statistics.stdev(values) if len(values) > 1 else 0.0
                tokens = statistics.fmean(point.tokens for point in found)
                curves.setdefault(name, []).append((tokens, statistics.fmean(values), deviation))
    return curves


def _keyed(points: Sequence[Point]) -> dict[tuple[str, int], Point]:
    """(phase, number in the phase or -1 for its last) -> point, in order."""
    by_phase: dict[str, list[Point]] = {}
    for point in points:
        by_phase.setdefault(point.phase, []).append(point)
    return {
        (phase, -1 if point is each[-1] else number): point
        for phase, each in by_phase.items()
        for number, point in enumerate(each)
    }


def draw_losses(records: StudyRecords) -> Any | None:
    """Draws validation loss over tokens, a panel per language; None without evaluations."""
    return _draw(
        records,
        losses,
        title="Validation loss: {}",
        label="nats per token",
        decorate=partial(fit_late_values, after=LATE),
        columns=2,
    )


def draw_trained_and_held_out(records: StudyRecords) -> Any | None:
    """Draws P@1 of trained words over tokens, and of held-out words; None without word retrieval."""
    return _draw(
        records, trained_and_held_out, title="P@1 of {}", label="P@1, mean over layers", decorate=_unit, columns=2
    )


def draw_by_layer(records: StudyRecords) -> Any | None:
    """Draws P@1 over tokens, a panel per layer; None without word retrieval."""
    measured = watched_by_layer if uses_watch(records) else by_layer
    return _draw(records, measured, title="Layer {}", label="P@1", decorate=_unit, columns=3, most=MOST_LAYERS)


def uses_watch(records: StudyRecords) -> bool:
    """Whether the plot by layer draws the alignment watch: if all runs with word retrieval have one, and measured more
    often with it."""
    measured = [
        each.record
        for each in records.complete
        if each.record.watch or any(point.word_retrieval_p_at_1 for point in each.record.evaluations)
    ]
    return bool(measured) and all(len(each.watch) > len(each.evaluations) for each in measured)


def _draw(
    records: StudyRecords,
    measured: Callable[[RunRecord], list[Point]],
    *,
    title: str,
    label: str,
    decorate: Callable[..., None],
    columns: int,
    most: int | None = None,
) -> Any | None:
    """Draws a panel per series and a line per run, with a band of one standard deviation.

    Args:
        most: Maximum number of panels, at equal distances; None for all.
    """
    curves = {
        run.name: mean_curves([measured(record) for record in records.of_run(run.name)]) for run in records.study.runs
    }
    deepest = sorted(curves.values(), key=len, reverse=True)
    panels = list(dict.fromkeys(name for by_name in deepest for name in by_name))
    if most is not None:
        panels = _thinned(panels, most)
    if not panels:
        return None
    styles = run_styles([run.name for run in records.study.runs])
    with plot_style():
        width = 10.4 / min(columns, max(len(panels), 2))
        figure, axes = new_figure(len(panels), columns=columns, panel_width=width, height=4.2 if columns == 2 else 3.0)
        for axis, panel in zip(axes, panels, strict=True):
            drawn = []
            for name, by_name in curves.items():
                if not by_name.get(panel):
                    continue
                tokens, means, deviations = zip(*by_name[panel], strict=True)
                axis.plot(tokens, means, **{**styles[name], "linewidth": 1.5, "markersize": 4.5})
                low, high = ([m + side * d for m, d in zip(means, deviations, strict=True)] for side in (-1, 1))
                axis.fill_between(tokens, low, high, color=styles[name]["color"], alpha=0.15, linewidth=0)
                drawn.append(list(zip(tokens, means, strict=True)))
            decorate(axis, drawn)
            axis.set_title(shorten(title.format(panel), MAX_TITLE_LENGTH))
            axis.set_ylabel(label)
            tokens_axis(axis)
        shown = [name for name, by_name in curves.items() if by_name]
        add_legend(figure, {f"{name}{records.missing_seeds(name)}": styles[name] for name in shown})
    return figure


def _thinned(panels: list[str], most: int) -> list[str]:
    """At most `most` panels, the first and the last among them."""
    count = min(len(panels), most)
    return [panels[round(index * (len(panels) - 1) / max(count - 1, 1))] for index in range(count)]


def _unit(axis: Any, _curves: object) -> None:
    axis.set_ylim(-0.03, 1.03)
