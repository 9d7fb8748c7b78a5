"""What a run of a study cost: seconds, memory, and its tokens by kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prealign.checkpoint.directory import latest_checkpoint
from megatron_prealign.checkpoint.state import read_state
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.run_record import RunRecord
from megatron_prealign.recipe import LANGUAGE_MODEL, Recipe
from megatron_prealign.study.definition import Study
from megatron_prealign.study.matrix import Job
from megatron_prealign.study.results import Row, by_seed, ratio
from megatron_prealign.study.tables import Table, cell
from megatron_prealign.training.metrics_file import METRICS_FILE

SECONDS, MEMORY, TOKENS = "seconds", "memory_gb", "tokens"
ALIGNMENT_SAMPLES, ALIGNMENT_WORDS = "tokens_alignment_samples", "tokens_alignment_words"
GUARD_WORDS, LANGUAGE_MODEL_SAMPLES = "tokens_guard_words", "tokens_language_model"
PARTS = {
    ALIGNMENT_SAMPLES: "alignment samples",
    ALIGNMENT_WORDS: "alignment words",
    GUARD_WORDS: "guard words",
    LANGUAGE_MODEL_SAMPLES: "language-model tokens",
}
"""Parts of the tokens, which add up to `TOKENS` -> title of their column."""
_CAPTION = (
    "Mean ± standard deviation over seeds; ratios are taken seed by seed. Seconds of training compare only if the runs "
    "trained under the same load: on the same machine, with the same number of other runs next to them. Memory is the "
    "peak of the process. The last four columns are parts of the tokens."
)


@dataclass(frozen=True)
class Cost:
    """Cost of one job."""

    values: Mapping[str, float]
    """Metric -> value, for those that are known."""
    unknown: Mapping[str, str]
    """Metric -> why it has no value."""


def read_cost(job: Job, record: RunRecord) -> Cost:
    """Reads the cost of a complete job.

    Args:
        record: Of the job, with at least one evaluation.
    """
    last = record.evaluations[-1]
    values: dict[str, float] = {SECONDS: last.seconds, TOKENS: float(last.tokens)}
    unknown: dict[str, str] = {}
    memory = [point.memory_gb for point in record.train if point.memory_gb is not None]
    if memory:
        values[MEMORY] = max(memory)
    else:
        unknown[MEMORY] = f"no memory_gb in {METRICS_FILE}"
    try:
        checkpoint = latest_checkpoint(job.recipe.checkpoint_dir)
        if checkpoint is None:
            raise UserError("no checkpoint")
        parts, missing = token_parts(job.recipe, read_state(checkpoint))
    except UserError as error:
        parts, missing = {}, dict.fromkeys(PARTS, str(error))
    return Cost({**values, **parts}, {**unknown, **missing})


def token_parts(recipe: Recipe, state: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, str]]:
    """Splits the tokens of a run by the counters of its last checkpoint.

    Args:
        state: Content of state.json.

    Returns:
        Values of `PARTS` that are known, and metric -> reason for the others.
    """
    if recipe.checkpoint.load is not None and recipe.checkpoint.load_parts == "all":
        return {}, dict.fromkeys(PARTS, "continues the run of checkpoint.load, whose samples may differ in length")
    try:
        counters = TrainState.from_dict(dict(state["train_state"]))
    except ValueError as error:
        return {}, dict.fromkeys(PARTS, f"state.json: {error}")
    if state["phase"] != LANGUAGE_MODEL:
        return {}, dict.fromkeys(PARTS, f"the last checkpoint is of phase {state['phase']}")
    length = recipe.data.seq_length
    before, samples = counters.phase_start_samples * length, counters.consumed_samples * length
    counts = {
        ALIGNMENT_SAMPLES: before,
        ALIGNMENT_WORDS: counters.phase_start_tokens - before,
        GUARD_WORDS: counters.tokens - counters.phase_start_tokens - (samples - before),
        LANGUAGE_MODEL_SAMPLES: samples - before,
    }
    absent: dict[str, str] = {}
    if recipe.alignment is None:
        absent |= dict.fromkeys((ALIGNMENT_SAMPLES, ALIGNMENT_WORDS), "no alignment phase")
    if recipe.alignment_guard is None:
        absent[GUARD_WORDS] = "no alignment guard"
    if any(count < 0 or (count > 0 and name in absent) for name, count in counts.items()):
        # Another length or recipe for a part of the run: the parts would not add up.
        return {}, dict.fromkeys(PARTS, "the counters of state.json do not fit the recipe")
    return {name: float(count) for name, count in counts.items() if name not in absent}, absent


def cost_rows(job: Job, cost: Cost) -> list[Row]:
    """Rows of results.csv."""
    return [Row(job.run, job.seed, metric, "", "", value) for metric, value in cost.values.items()]


def cost_table(study: Study, rows: Sequence[Row], unknown: Mapping[tuple[str, int], Mapping[str, str]]) -> Table:
    """Table of the costs, with the ratio to the first run.

    Args:
        unknown: (run, seed) -> metric -> reason, for metrics without value.
    """
    first, seeds = study.runs[0].name, len(study.seeds)
    titles = {SECONDS: ("seconds", 1), MEMORY: ("memory, GB", 3), TOKENS: ("tokens", 0)}
    header = ["run"]
    for title, _ in titles.values():
        header += [title, f"{title.partition(',')[0]} / {first}"]
    values = {metric: by_seed(rows, metric) for metric in (*titles, *PARTS)}
    lines = []
    for run in study.runs:
        cells = [run.name]
        for metric, (_, digits) in titles.items():
            own, other = (values[metric].get((name, ""), {}) for name in (run.name, first))
            quotient = ratio(own, other)
            cells.append(cell(study, own, digits))
            cells.append("-" if quotient is None else quotient.text(seeds, 2))
        lines.append([*cells, *(cell(study, values[metric].get((run.name, "")), 0) for metric in PARTS)])
    return Table(
        "Cost",
        " ".join([_CAPTION, *_reasons(unknown)]),
        [*header, *PARTS.values()],
        lines,
    )


def _reasons(unknown: Mapping[tuple[str, int], Mapping[str, str]]) -> list[str]:
    """A sentence per reason, with the metrics and runs that it is about."""
    runs: dict[tuple[str, str], list[str]] = {}
    for (run, _), reasons in unknown.items():
        for reason in dict.fromkeys(reasons.values()):
            metrics = " and ".join(PARTS.get(name, name) for name, each in reasons.items() if each == reason)
            runs.setdefault((reason, metrics), []).append(run)
    return [
        f"Without {metrics} ({reason}): {', '.join(dict.fromkeys(found))}." for (reason, metrics), found in runs.items()
    ]
