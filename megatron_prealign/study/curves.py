"""Plot of a study: validation loss over tokens, mean and standard deviation over seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from megatron_prealign.evaluation.plots import (
    MAX_TITLE_LENGTH,
    add_legend,
    fit_late_values,
    new_figure,
    plot_style,
    run_styles,
    tokens_axis,
)
from megatron_prealign.evaluation.run_record import load_run
from megatron_prealign.study.definition import Study
from megatron_prealign.study.matrix import Job
from megatron_prealign.text import shorten


def draw_losses(study: Study, jobs: Sequence[Job]) -> Any | None:
    """Draws a panel per language and a line per run, with a band of one standard deviation; None without evaluations.

    Seeds are joined where they were evaluated at the same number of evaluations; the tokens of a step with words differ
    a little by seed, so a point is at the mean of their tokens.
    """
    curves = {run.name: _curves([job for job in jobs if job.run == run.name]) for run in study.runs}
    languages = list(dict.fromkeys(language for by_language in curves.values() for language in by_language))
    if not languages:
        return None
    styles = run_styles([run.name for run in study.runs])
    with plot_style():
        figure, axes = new_figure(len(languages))
        for axis, language in zip(axes, languages, strict=True):
            drawn = []
            for name, by_language in curves.items():
                points = by_language.get(language, [])
                if not points:
                    continue
                tokens, means, deviations = zip(*points, strict=True)
                axis.plot(tokens, means, **styles[name])
                low, high = ([m + side * d for m, d in zip(means, deviations, strict=True)] for side in (-1, 1))
                axis.fill_between(tokens, low, high, color=styles[name]["color"], alpha=0.2, linewidth=0)
                drawn.append(list(zip(tokens, means, strict=True)))
            fit_late_values(axis, drawn)
            axis.set_title(shorten(f"Validation loss: {language}", MAX_TITLE_LENGTH))
            axis.set_ylabel("nats per token")
            tokens_axis(axis)
        add_legend(figure, {name: styles[name] for name, by_language in curves.items() if by_language})
    return figure


def _curves(jobs: Sequence[Job]) -> dict[str, list[tuple[float, float, float]]]:
    """Language -> (tokens, mean, standard deviation) of each evaluation, over the seeds of a run."""
    records = [load_run(job.directory).evaluations for job in jobs]
    result: dict[str, list[tuple[float, float, float]]] = {}
    for points in zip(*records, strict=False):
        for language in points[0].validation_loss:
            values = [point.validation_loss.get(language, math.nan) for point in points]
            if not all(map(math.isfinite, values)):
                continue
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            tokens = statistics.fmean(point.tokens for point in points)
            result.setdefault(language, []).append((tokens, statistics.fmean(values), deviation))
    return result
