"""Means, deviations and differences of a study, compared with values by hand."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prealign.evaluation.run_record import load_run
from megatron_prealign.evaluation.word_pairs import SENTENCE_RETRIEVAL
from megatron_prealign.study.definition import Study, StudyRun
from megatron_prealign.study.results import (
    HELD_OUT,
    LOSS,
    LOSS_WORDS,
    P_AT_1,
    Row,
    Spread,
    by_seed,
    difference,
    loss_by_class,
    mean_over_names,
    ratio,
    rows_of,
    spread,
    to_csv,
)
from megatron_prealign.study.tables import Table, result_tables, to_markdown

STUDY = Study(
    output="x",
    base=[],
    seeds=[1, 2, 3],
    runs=[StudyRun(name="joint"), StudyRun(name="true", control="shuffled"), StudyRun(name="shuffled")],
)
LOSSES = {"joint": [4.0, 4.2, 4.4], "true": [3.0, 3.4, 3.5], "shuffled": [3.9, 4.3]}


def rows() -> list[Row]:
    return [
        Row(run, seed, LOSS, "en", "", value)
        for run, values in LOSSES.items()
        for seed, value in enumerate(values, start=1)
    ]


def cells(table: Table) -> dict[str, list[str]]:
    """First cell -> other cells."""
    return {first: rest for first, *rest in table.rows}


def test_sample_standard_deviation() -> None:
    measured = spread([4.0, 4.2, 4.4])
    assert (measured.mean, measured.seeds) == (pytest.approx(4.2), 3)
    assert measured.deviation == pytest.approx(0.2)
    assert measured.text(of=3) == "4.200 ± 0.200"
    single = spread([4.0])
    assert math.isnan(single.deviation)


@pytest.mark.parametrize(
    ("mean", "deviation", "seeds", "options", "expected"),
    [
        (4.345, 0.011, 2, {}, "4.345 ± 0.011 (2 of 3 seeds)"),
        (4.345, 0.011, 3, {}, "4.345 ± 0.011"),
        (4.345, math.nan, 1, {}, "4.345 (1 of 3 seeds)"),
        (1048576.0, 1234.0, 3, {"digits": 0}, "1,048,576 ± 1,234"),
        (-0.0001, 0.2, 3, {"signed": True}, "+0.000 ± 0.200"),
        (-0.25, 0.2, 2, {"signed": True, "digits": 2}, "-0.25 ± 0.20 (2 of 3 seeds)"),
    ],
)
def test_a_cell_says_which_seeds_are_missing(
    mean: float, deviation: float, seeds: int, options: Any, expected: str
) -> None:
    assert Spread(mean, deviation, seeds).text(3, **options) == expected


def test_differences_and_ratios_are_of_the_same_seed() -> None:
    measured = difference({1: 3.0, 2: 3.4, 3: 3.5}, {3: 4.4, 1: 4.0})
    assert measured is not None
    # -1.0 and -0.9, whatever seed 2 did.
    assert (measured.mean, measured.seeds) == (pytest.approx(-0.95), 2)
    assert measured.deviation == pytest.approx(0.05 * math.sqrt(2))
    assert difference({1: 3.0}, {2: 4.0}) is None
    quotient = ratio({1: 3.0, 2: 5.0, 3: 8.0}, {1: 2.0, 2: 0.0, 3: 4.0})
    assert quotient is not None
    assert (quotient.mean, quotient.seeds) == (1.75, 2)
    assert ratio({1: 3.0}, {1: 0.0}) is None


def test_layers_are_averaged_and_what_is_not_finite_is_left_out() -> None:
    values = [("emb", 0.5), ("1", 0.25), ("out", math.nan)]
    given = [Row("a", 1, P_AT_1, "en-de", layer, value) for layer, value in values]
    assert by_seed(given, P_AT_1) == {("a", "en-de"): {1: 0.375}}
    assert by_seed(given, HELD_OUT) == {}
    lines = list(csv.reader(io.StringIO(to_csv(given))))
    assert lines == [
        ["run", "seed", "metric", "name", "layer", "value"],
        ["a", "1", P_AT_1, "en-de", "emb", "0.5"],
        ["a", "1", P_AT_1, "en-de", "1", "0.25"],
    ]


def test_a_mean_over_pairs_needs_all_of_them() -> None:
    given = [Row("a", seed, P_AT_1, pair, "emb", value) for seed, pair, value in ((1, "x", 0.2), (1, "y", 0.4))]
    given += [Row("a", 2, P_AT_1, "x", "emb", 0.2), Row("b", 1, P_AT_1, "y", "emb", 0.6)]
    assert mean_over_names(given, P_AT_1) == {"a": {1: pytest.approx(0.3)}}
    assert mean_over_names(given, P_AT_1, ["y"]) == {"a": {1: 0.4}, "b": {1: 0.6}}
    assert mean_over_names([], P_AT_1) == {}


def test_tables() -> None:
    main, against_first, against_control = result_tables(STUDY, rows())
    assert cells(main)["joint"] == ["4.200 ± 0.200"]
    assert cells(main)["shuffled"] == ["4.100 ± 0.283 (2 of 3 seeds)"]
    assert cells(against_first) == {
        "true": ["joint", "-0.900 ± 0.100"],
        "shuffled": ["joint", "+0.000 ± 0.141 (2 of 3 seeds)"],
    }
    assert cells(against_control) == {"true": ["shuffled", "-0.900 ± 0.000 (2 of 3 seeds)"]}


def test_a_study_of_one_run_has_no_differences() -> None:
    (table,) = result_tables(replace(STUDY, runs=STUDY.runs[:1]), [row for row in rows() if row.run == "joint"])
    assert table.rows == [["joint", "4.200 ± 0.200"]]


def test_a_metric_that_no_run_has_is_a_dash_and_never_zero() -> None:
    main, *_ = result_tables(STUDY, [*rows(), Row("true", 1, P_AT_1, "en-de", "emb", 0.5)])
    column = main.header.index("P@1 en-de") - 1
    found = {run: row[column] for run, row in cells(main).items()}
    assert found == {"joint": "-", "true": "0.500 (1 of 3 seeds)", "shuffled": "-"}


def test_sentence_retrieval_has_a_column() -> None:
    values = [Row("true", 1, SENTENCE_RETRIEVAL, "en-de", layer, value) for layer, value in (("emb", 0.5), ("1", 0.7))]
    main, *_ = result_tables(STUDY, [*rows(), *values])
    assert cells(main)["true"][main.header.index("sentence P@1 en-de") - 1] == "0.600 (1 of 3 seeds)"
    main, *_ = result_tables(STUDY, rows())
    assert not any("sentence" in title for title in main.header)


def test_rows_of_a_run(tmp_path: Path) -> None:
    metrics = {
        LOSS: {"en": 4.0},
        P_AT_1: {"en-de": [0.1, 0.2, 0.3]},
        HELD_OUT: {},
        SENTENCE_RETRIEVAL: {"en-de": [0.4, 0.5, 0.6]},
    }
    line = {"kind": "evaluation", "phase": "language_model", "step": 1, "tokens": 5, "seconds": 2.0, **metrics}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    job: Any = SimpleNamespace(run="a", seed=1)
    found = list(rows_of(job, load_run(tmp_path).evaluations[-1]))
    values = {(row.metric, row.name, row.layer): row.value for row in found}
    assert values[SENTENCE_RETRIEVAL, "en-de", "1"] == 0.5
    assert [row.value for row in found if row.metric == P_AT_1] == [0.1, 0.2, 0.3]


def test_markdown() -> None:
    table = Table("Title", "Caption.", ["a|b", "c"], [["1", "2|3"]])
    text = to_markdown([table], {"x_seed1": "not complete", "y": "other", "x_seed2": "not complete"})
    assert text == (
        "## Title\n\nCaption.\n\n| a\\|b | c |\n| --- | --- |\n| 1 | 2\\|3 |\n\n"
        "Not in the tables: x_seed1, x_seed2: not complete; y: other.\n"
    )
    assert "Not in the tables" not in to_markdown([table], {})


def test_losses_by_class_of_word(tmp_path: Path) -> None:
    by_class = {
        "joint": {"trained": 4.0, "held_out": 6.0, "other": 3.0},
        "true": {"trained": 3.5, "held_out": 5.75, "other": 3.0},
        # No held-out word in this text.
        "shuffled": {"trained": 4.25, "other": 3.0},
    }
    given = rows()
    for run, losses in by_class.items():
        for seed in STUDY.seeds:
            line = {
                **dict.fromkeys(("step", "tokens", "seconds"), 1),
                "kind": "evaluation",
                "phase": "language_model",
                "validation_loss": {},
                "validation_loss_words": {"en": losses},
            }
            directory = tmp_path / f"{run}_{seed}"
            directory.mkdir()
            (directory / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            job: Any = SimpleNamespace(run=run, seed=seed)
            given += rows_of(job, load_run(directory).evaluations[-1])
    assert Row("true", 2, LOSS_WORDS, "en", "trained", 3.5) in given
    assert loss_by_class(given)["true", ("en", "held_out")] == {1: 5.75, 2: 5.75, 3: 5.75}
    *_, main, against_first, against_control = result_tables(STUDY, given)
    assert main.title == "Loss by class of word"
    assert main.header == ["run", "en, trained words", "en, held-out words", "en, other tokens"]
    assert cells(main)["true"] == ["3.500 ± 0.000", "5.750 ± 0.000", "3.000 ± 0.000"]
    assert cells(main)["shuffled"] == ["4.250 ± 0.000", "-", "3.000 ± 0.000"]
    assert against_first.title == "Loss by class of word against joint"
    assert cells(against_first)["true"] == ["joint", "-0.500 ± 0.000", "-0.250 ± 0.000", "+0.000 ± 0.000"]
    assert against_control.title == "Loss by class of word against the control"
    assert cells(against_control) == {"true": ["shuffled", "-0.750 ± 0.000", "-", "+0.000 ± 0.000"]}
    # The losses of all tokens stay as they are.
    assert result_tables(STUDY, given)[:3] == result_tables(STUDY, rows())
    # Other classes do not compare: no run has a difference from joint by class.
    classes = {"joint": 0.05, "true": 0.5, "shuffled": 0.5}
    *_, before, main, against_control = result_tables(STUDY, given, classes)
    assert before.title == "Loss against the control"
    assert cells(main)["true"] == ["3.500 ± 0.000", "5.750 ± 0.000", "3.000 ± 0.000"]
    assert cells(against_control) == {"true": ["shuffled", "-0.750 ± 0.000", "-", "+0.000 ± 0.000"]}
