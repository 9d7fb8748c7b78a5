"""Tables of a study, which results.md and results.html both show."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_prealign.evaluation.word_classes import CLASS_TEXTS, CLASSES
from megatron_prealign.evaluation.word_pairs import SENTENCE_RETRIEVAL
from megatron_prealign.study.definition import Study
from megatron_prealign.study.results import (
    HELD_OUT,
    LOSS,
    LOSS_WORDS,
    P_AT_1,
    Row,
    SeedValues,
    by_seed,
    difference,
    loss_by_class,
    names_of,
    spread,
)

Values = Mapping[tuple[str, str], SeedValues]
_SAME_CLASSES = (
    "Runs compare only if they have the same held-out text, dictionary table and dictionary.held_out_fraction: others "
    "have other words in each class."
)


@dataclass(frozen=True)
class Table:
    """A table in plain text."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]


def result_tables(study: Study, rows: Sequence[Row], classes: Mapping[str, Any] | None = None) -> list[Table]:
    """Losses and word retrieval of the runs, the differences of loss from the first run and from the controls, and the
    same of the losses by class of word.

    Args:
        classes: Run -> what its classes of words depend on, as of `matrix.word_class_fields`. Runs that differ in it
            have no difference of losses by class. A run without one compares with others without one.
    """
    losses = by_seed(rows, LOSS)
    languages = names_of(rows, LOSS)
    return [
        _main(study, rows, languages),
        *_comparisons(study, losses, languages, "Loss"),
        *_by_class(study, rows, classes),
    ]


def _comparisons(
    study: Study,
    losses: Values,
    columns: Sequence[str],
    title: str,
    note: str = "",
    classes: Mapping[str, Any] | None = None,
) -> Iterator[Table]:
    """Differences of losses from the baselines and from the controls, for runs that have some.

    Args:
        note: End of the captions, with a space before it.
        classes: Run -> what two runs must have in common to be compared; others have no row.
    """
    same = classes or {}
    controls = {run.name: run.control for run in study.runs if run.control is not None}
    against_baseline, against_control = (
        {run: other for run, other in others.items() if same.get(run) == same.get(other)}
        for others in (study.baselines, controls)
    )
    baseline = baseline_name(study, against_baseline)
    for others, name, what in (
        (against_baseline, baseline, f"{baseline}, taken seed by seed."),
        (
            against_control,
            "the control",
            "the control with a shuffled dictionary, taken seed by seed: what true pairs add.",
        ),
    ):
        if others:
            caption = f"Differences of loss from {what}{note}"
            yield _differences(study, losses, columns, others, f"{title} against {name}", caption)


def _by_class(study: Study, rows: Sequence[Row], classes: Mapping[str, Any] | None) -> list[Table]:
    """Losses by class of word, and their differences from the first run and from the controls; none without them."""
    found = loss_by_class(rows)
    columns = {
        (language, name): f"{language}, {CLASS_TEXTS[name]}"
        for language in names_of(rows, LOSS_WORDS)
        for name in CLASSES
        if any(column == (language, name) for _, column in found)
    }
    if not columns:
        return []
    losses = {(run, columns[column]): values for (run, column), values in found.items()}
    titles, title = list(columns.values()), "Loss by class of word"
    lines = [[run.name, *(cell(study, losses.get((run.name, each))) for each in titles)] for run in study.runs]
    caption = (
        "Loss of the tokens of words of the dictionary that training may use, of words held out of training, and of "
        f"all other tokens, in nats per token. The log of a run has the share of each class. {_SAME_CLASSES}"
    )
    return [
        Table(title, caption, ["run", *titles], lines),
        *_comparisons(study, losses, titles, title, f" {_SAME_CLASSES}", classes),
    ]


def baseline_name(study: Study, runs: Iterable[str]) -> str:
    """What differences of these runs are taken from: the name of a run, if they have one in common."""
    names = {study.baselines[run] for run in runs if run in study.baselines}
    return names.pop() if len(names) == 1 else "the baseline"


def to_markdown(tables: Iterable[Table], absent: Mapping[str, str]) -> str:
    """Text of results.md.

    Args:
        absent: Job name -> reason, of the jobs that are in no table.
    """
    parts = []
    for table in tables:
        lines = [_line(table.header), _line(["---"] * len(table.header)), *map(_line, table.rows)]
        parts += [f"## {table.title}", table.caption, "\n".join(lines)]
    if absent:
        parts.append(not_in_tables(absent))
    return "\n\n".join(parts) + "\n"


def not_in_tables(absent: Mapping[str, str]) -> str:
    """Sentence about the jobs that are in no table."""
    jobs: dict[str, list[str]] = {}
    for name, reason in absent.items():
        jobs.setdefault(reason, []).append(name)
    return "Not in the tables: " + "; ".join(f"{', '.join(names)}: {reason}" for reason, names in jobs.items()) + "."


def difference_cell(study: Study, values: SeedValues, other: SeedValues) -> str:
    """Mean and deviation of the differences, with a sign; a dash without a common seed."""
    found = difference(values, other)
    return "-" if found is None else found.text(len(study.seeds), signed=True)


def cell(study: Study, values: SeedValues | None, digits: int = 3) -> str:
    """Mean and deviation; a dash without values."""
    return spread(list(values.values())).text(len(study.seeds), digits) if values else "-"


def _main(study: Study, rows: Sequence[Row], languages: Sequence[str]) -> Table:
    columns = [
        *((f"loss {language}", LOSS, language) for language in languages),
        *((f"P@1 {pair}", P_AT_1, pair) for pair in names_of(rows, P_AT_1)),
        *((f"held-out P@1 {pair}", HELD_OUT, pair) for pair in names_of(rows, HELD_OUT)),
        *((f"sentence P@1 {pair}", SENTENCE_RETRIEVAL, pair) for pair in names_of(rows, SENTENCE_RETRIEVAL)),
    ]
    values = {metric: by_seed(rows, metric) for _, metric, _ in columns}
    lines = [
        [run.name, *(cell(study, values[metric].get((run.name, name))) for _, metric, name in columns)]
        for run in study.runs
    ]
    caption = (
        f"Mean ± standard deviation over seeds {', '.join(map(str, study.seeds))}, last evaluation. Loss in nats per "
        "token; P@1 is the mean over layers."
    )
    return Table("Runs", caption, ["run", *(title for title, _, _ in columns)], lines)


def _differences(
    study: Study, losses: Values, languages: Sequence[str], others: Mapping[str, str], title: str, caption: str
) -> Table:
    lines = [
        [
            run.name,
            others[run.name],
            *(
                difference_cell(
                    study, losses.get((run.name, language), {}), losses.get((others[run.name], language), {})
                )
                for language in languages
            ),
        ]
        for run in study.runs
        if run.name in others
    ]
    return Table(title, caption, ["run", "against", *languages], lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in cells)} |"
