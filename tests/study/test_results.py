"""Means, deviations and differences of a study, compared with values by hand."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prealign.evaluation.run_record import load_run
from megatron_prealign.study.definition import Study, StudyRun
from megatron_prealign.study.matrix import Job
from megatron_prealign.study.results import (
    HELD_OUT,
    LOSS,
    P_AT_1,
    SENTENCES,
    Row,
    _rows,
    by_seed,
    difference,
    markdown,
    spread,
    to_csv,
)

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


def table(text: str, title: str) -> dict[str, list[str]]:
    """First cell -> other cells, of the first table after `title`."""
    lines = text[text.index(title) :].splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("|"))
    found = {}
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        first, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        found[first] = rest
    return found


def test_sample_standard_deviation() -> None:
    measured = spread([4.0, 4.2, 4.4])
    assert (measured.mean, measured.seeds) == (pytest.approx(4.2), 3)
    assert measured.deviation == pytest.approx(0.2)
    assert str(measured) == "4.200 ± 0.200"
    single = spread([4.0])
    assert math.isnan(single.deviation) and str(single) == "4.000 (1 seed)"


def test_differences_are_of_the_same_seed() -> None:
    measured = difference({1: 3.0, 2: 3.4, 3: 3.5}, {3: 4.4, 1: 4.0})
    assert measured is not None
    # -1.0 and -0.9, whatever seed 2 did.
    assert (measured.mean, measured.seeds) == (pytest.approx(-0.95), 2)
    assert measured.deviation == pytest.approx(0.05 * math.sqrt(2))
    assert difference({1: 3.0}, {2: 4.0}) is None


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


def test_tables() -> None:
    text = markdown(STUDY, rows(), {"shuffled_seed3": "not complete"})
    assert table(text, "Mean ±")["joint"][0] == "4.200 ± 0.200"
    assert table(text, "Mean ±")["shuffled"][0] == "4.100 ± 0.283"
    against_first = table(text, "Differences of loss from joint")
    assert against_first["true"] == ["joint", "-0.900 ± 0.100"]
    assert against_first["shuffled"] == ["joint", "+0.000 ± 0.141"]
    assert "joint" not in against_first
    against_control = table(text, "from the control")
    assert against_control["true"] == ["shuffled", "-0.900 ± 0.000"]
    assert list(against_control) == ["run", "---", "true"]
    assert "Not in the tables: shuffled_seed3: not complete." in text


def test_a_study_of_one_run_has_no_differences() -> None:
    text = markdown(replace(STUDY, runs=STUDY.runs[:1]), [row for row in rows() if row.run == "joint"], {})
    assert "4.200 ± 0.200" in text and "Differences" not in text


def test_a_metric_that_no_run_has_is_a_dash_and_never_zero() -> None:
    given: list[Any] = [*rows(), Row("true", 1, P_AT_1, "en-de", "emb", 0.5)]
    text = markdown(STUDY, given, {})
    header, *_ = [line for line in text.splitlines() if line.startswith("| run")]
    column = [cell.strip() for cell in header.strip("|").split("|")].index("P@1 en-de") - 1
    cells = {run: cells[column] for run, cells in table(text, "Mean ±").items()}
    assert (cells["joint"], cells["true"]) == ("-", "0.500 (1 seed)")
    assert "sentence P@1" not in text


def test_sentence_retrieval_has_a_column() -> None:
    given = [
        *rows(),
        *(Row("true", 1, SENTENCES, "en-de", layer, value) for layer, value in (("emb", 0.5), ("1", 0.7))),
    ]
    header = next(line for line in markdown(STUDY, given, {}).splitlines() if line.startswith("| run"))
    column = [cell.strip() for cell in header.strip("|").split("|")].index("sentence P@1 en-de") - 1
    assert table(markdown(STUDY, given, {}), "Mean ±")["true"][column] == "0.600 (1 seed)"


def test_rows_of_a_run(tmp_path: Path) -> None:
    metrics = {
        LOSS: {"en": 4.0},
        P_AT_1: {"en-de": [0.1, 0.2, 0.3]},
        HELD_OUT: {},
        SENTENCES: {"en-de": [0.4, 0.5, 0.6]},
    }
    line = {"kind": "evaluation", "phase": "language_model", "step": 1, "tokens": 5, "seconds": 2.0, **metrics}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    record = load_run(tmp_path)
    found = list(_rows(Job("a", 1, None, tmp_path, tmp_path), record, record.evaluations[-1]))  # type: ignore[arg-type]
    values = {(row.metric, row.name, row.layer): row.value for row in found}
    assert values[SENTENCES, "en-de", "1"] == 0.5
    assert [row.value for row in found if row.metric == P_AT_1] == [0.1, 0.2, 0.3]
