"""Results of a study: rows for results.csv, and means, standard deviations and differences over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from megatron_prealign.evaluation.plots import layer_names
from megatron_prealign.evaluation.run_record import EvaluationPoint
from megatron_prealign.evaluation.word_pairs import SENTENCE_RETRIEVAL
from megatron_prealign.study.matrix import Job

LOSS_WORDS = "validation_loss_words"
LOSS, P_AT_1, HELD_OUT = "validation_loss", "word_retrieval_p_at_1", "word_retrieval_p_at_1_held_out"

SeedValues = Mapping[int, float]
"""Seed -> value."""


@dataclass(frozen=True)
class Row:
    """One value of results.csv."""

    run: str
    seed: int
    metric: str
    name: str
    """Language, or language pair; empty for metrics of the whole run."""
    layer: str
    """Layer of retrieval: emb, 1 to L, out; class of word of a loss by class; empty for other metrics."""
    value: float


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float
    """Sample standard deviation; NaN for a single seed."""
    seeds: int

    def text(self, of: int, digits: int = 3, *, signed: bool = False) -> str:
        """The cell of a table, which says so if seeds of the study are missing.

        Args:
            of: Number of seeds of the study.
            digits: Decimal places.
            signed: Whether to write a plus sign.
        """
        # Zero has no minus sign.
        mean = round(self.mean, digits) + 0.0
        parts = [f"{mean:{'+' if signed else ''},.{digits}f}"]
        if self.seeds > 1:
            parts.append(f"± {self.deviation:,.{digits}f}")
        if self.seeds < of:
            parts.append(f"({self.seeds} of {of} seeds)")
        return " ".join(parts)


def rows_of(job: Job, last: EvaluationPoint) -> Iterator[Row]:
    """Rows of an evaluation.

    Args:
        last: The job's last evaluation.
    """
    for language, loss in last.validation_loss.items():
        yield Row(job.run, job.seed, LOSS, language, "", loss)
    for language, by_class in last.validation_loss_words.items():
        for name, loss in by_class.items():
            yield Row(job.run, job.seed, LOSS_WORDS, language, name, loss)
    for metric, by_pair in (
        (P_AT_1, last.word_retrieval_p_at_1),
        (HELD_OUT, last.word_retrieval_p_at_1_held_out),
        (SENTENCE_RETRIEVAL, last.sentence_retrieval_p_at_1),
    ):
        for pair, values in by_pair.items():
            for layer, value in zip(layer_names(len(values)), values, strict=True):
                yield Row(job.run, job.seed, metric, pair, layer, value)


def to_csv(rows: Iterable[Row]) -> str:
    """Text of results.csv; values that are not finite are left out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(astuple(row) for row in rows if math.isfinite(row.value))
    return text.getvalue()


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of at least one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), deviation, len(values))


def by_seed(rows: Iterable[Row], metric: str) -> dict[tuple[str, str], dict[int, float]]:
    """(run, name) -> seed -> value; the mean over layers of a metric that has them."""
    collected: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        if row.metric == metric and math.isfinite(row.value):
            collected.setdefault((row.run, row.name), {}).setdefault(row.seed, []).append(row.value)
    return {key: {seed: statistics.fmean(values) for seed, values in seeds.items()} for key, seeds in collected.items()}


def loss_by_class(rows: Iterable[Row]) -> dict[tuple[str, tuple[str, str]], dict[int, float]]:
    """(run, (language, class of word)) -> seed -> loss."""
    collected: dict[tuple[str, tuple[str, str]], dict[int, float]] = {}
    for row in rows:
        if row.metric == LOSS_WORDS and math.isfinite(row.value):
            collected.setdefault((row.run, (row.name, row.layer)), {})[row.seed] = row.value
    return collected


def mean_over_names(
    rows: Sequence[Row], metric: str, names: Iterable[str] | None = None
) -> dict[str, dict[int, float]]:
    """Run -> seed -> mean over the names (language pairs) of a metric.

    Args:
        names: Those to average; None for all. A seed that lacks one has no mean.
    """
    values = by_seed(rows, metric)
    wanted = list(names_of(rows, metric) if names is None else names)
    result: dict[str, dict[int, float]] = {}
    for run in dict.fromkeys(run for run, _ in values):
        of_names = [values.get((run, name), {}) for name in wanted]
        common = set.intersection(*map(set, of_names)) if of_names else set()
        if common:
            result[run] = {seed: statistics.fmean(each[seed] for each in of_names) for seed in sorted(common)}
    return result


def names_of(rows: Iterable[Row], metric: str) -> list[str]:
    """Languages or language pairs that a metric has values of."""
    return list(dict.fromkeys(row.name for row in rows if row.metric == metric))


def difference(values: SeedValues, other: SeedValues) -> Spread | None:
    """Mean and deviation of the differences per seed; None without a common seed."""
    common = [values[seed] - other[seed] for seed in values if seed in other]
    return spread(common) if common else None


def ratio(values: SeedValues, other: SeedValues) -> Spread | None:
    """Mean and deviation of the ratios per seed; None without a common seed whose other value is positive."""
    common = [values[seed] / other[seed] for seed in values if other.get(seed, 0) > 0]
    return spread(common) if common else None
