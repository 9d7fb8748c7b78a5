"""Results of a study: rows for results.csv, and tables of means and standard deviations over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.plots import layer_names
from megatron_prealign.evaluation.run_record import EvaluationPoint, RunRecord, load_run
from megatron_prealign.study.definition import Study
from megatron_prealign.study.execution import is_complete
from megatron_prealign.study.matrix import Job
from megatron_prealign.training.metrics_file import METRICS_FILE, MetricsFile

LOSS, P_AT_1, HELD_OUT = "validation_loss", "word_retrieval_p_at_1", "word_retrieval_p_at_1_held_out"
SENTENCES = "sentence_retrieval_p_at_1"
SECONDS, MEMORY, TOKENS = "seconds", "memory_gb", "tokens"


@dataclass(frozen=True)
class Row:
    """One value of results.csv."""

    run: str
    seed: int
    metric: str
    name: str
    """Language, or language pair; empty for metrics of the whole run."""
    layer: str
    """Layer of retrieval: emb, 1 to L, out; empty for other metrics."""
    value: float


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float
    """Sample standard deviation; NaN for a single seed."""
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}" if self.seeds > 1 else f"{self.mean:.3f} (1 seed)"


def collect(jobs: Sequence[Job]) -> tuple[list[Row], dict[str, str]]:
    """Reads the last evaluation of every complete job.

    Returns:
        Rows, and job name -> reason for each job that has none.
    """
    rows: list[Row] = []
    absent: dict[str, str] = {}
    for job in jobs:
        if not is_complete(job):
            absent[job.name] = "not complete"
            continue
        try:
            record = load_run(job.directory)
        except UserError as error:
            absent[job.name] = str(error)
            continue
        if not record.evaluations:
            absent[job.name] = f"no evaluation in {job.directory / METRICS_FILE}"
            continue
        rows += _rows(job, record, record.evaluations[-1])
    return rows, absent


def _rows(job: Job, record: RunRecord, last: EvaluationPoint) -> Iterator[Row]:
    for language, loss in last.validation_loss.items():
        yield Row(job.run, job.seed, LOSS, language, "", loss)
    for metric, by_pair in (
        (P_AT_1, last.word_retrieval_p_at_1),
        (HELD_OUT, last.word_retrieval_p_at_1_held_out),
        (SENTENCES, last.sentence_retrieval_p_at_1),
    ):
        for pair, values in by_pair.items():
            for layer, value in zip(layer_names(len(values)), values, strict=True):
                yield Row(job.run, job.seed, metric, pair, layer, value)
    yield Row(job.run, job.seed, TOKENS, "", "", float(last.tokens))
    yield Row(job.run, job.seed, SECONDS, "", "", last.seconds)
    memory = [line.get("memory_gb") for line in MetricsFile(job.directory / METRICS_FILE).read("train")]
    known = [float(value) for value in memory if isinstance(value, int | float)]
    if known:
        yield Row(job.run, job.seed, MEMORY, "", "", max(known))


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


def difference(values: Mapping[int, float], other: Mapping[int, float]) -> Spread | None:
    """Mean and deviation of the differences per seed; None without a common seed."""
    common = [values[seed] - other[seed] for seed in values if seed in other]
    return spread(common) if common else None


def markdown(study: Study, rows: Sequence[Row], absent: Mapping[str, str]) -> str:
    """Tables of a study in Markdown."""
    first = study.runs[0].name
    losses = by_seed(rows, LOSS)
    languages = list(dict.fromkeys(name for _, name in losses))
    parts = [
        f"Mean ± standard deviation over seeds {', '.join(map(str, study.seeds))}. Loss in nats per token; P@1 is the "
        "mean over layers.",
        _table(study, rows, languages),
    ]
    if len(study.runs) > 1:
        parts += [
            f"Differences of loss from {first}, per seed:",
            _differences(study, losses, languages, {run.name: first for run in study.runs[1:]}),
        ]
    controls = {run.name: run.control for run in study.runs if run.control is not None}
    if controls:
        parts += [
            "Differences of loss from the control with a shuffled dictionary, per seed: what true pairs add.",
            _differences(study, losses, languages, controls),
        ]
    if absent:
        parts.append("Not in the tables: " + "; ".join(f"{name}: {reason}" for name, reason in absent.items()) + ".")
    return "\n\n".join(parts) + "\n"


def _table(study: Study, rows: Sequence[Row], languages: Sequence[str]) -> str:
    columns = [
        *((f"loss {language}", LOSS, language) for language in languages),
        *((f"P@1 {pair}", P_AT_1, pair) for pair in _names(rows, P_AT_1)),
        *((f"held-out P@1 {pair}", HELD_OUT, pair) for pair in _names(rows, HELD_OUT)),
        *((f"sentence P@1 {pair}", SENTENCES, pair) for pair in _names(rows, SENTENCES)),
        ("seconds", SECONDS, ""),
        ("memory, GB", MEMORY, ""),
    ]
    values = {metric: by_seed(rows, metric) for _, metric, _ in columns}
    lines = [_line(["run", *(title for title, _, _ in columns)]), _line(["---"] * (len(columns) + 1))]
    for run in study.runs:
        cells = [values[metric].get((run.name, name)) for _, metric, name in columns]
        lines.append(_line([run.name, *(str(spread(list(cell.values()))) if cell else "-" for cell in cells)]))
    return "\n".join(lines)


def _differences(
    study: Study,
    losses: Mapping[tuple[str, str], Mapping[int, float]],
    languages: Sequence[str],
    others: Mapping[str, str],
) -> str:
    lines = [_line(["run", "against", *languages]), _line(["---"] * (len(languages) + 2))]
    for run in study.runs:
        other = others.get(run.name)
        if other is None:
            continue
        cells = [
            difference(losses.get((run.name, language), {}), losses.get((other, language), {}))
            for language in languages
        ]
        lines.append(_line([run.name, other, *("-" if cell is None else _signed(cell) for cell in cells)]))
    return "\n".join(lines)


def _signed(value: Spread) -> str:
    # Zero has no minus sign.
    mean = round(value.mean, 3) + 0.0
    return f"{mean:+.3f} ± {value.deviation:.3f}" if value.seeds > 1 else f"{mean:+.3f} (1 seed)"


def _names(rows: Iterable[Row], metric: str) -> list[str]:
    return list(dict.fromkeys(row.name for row in rows if row.metric == metric))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
