"""Sweeps: the table by hand, the axis, and what the plot shows."""

from pathlib import Path

import pytest
from support.study_records import evaluation, records_of, study_of

from megatron_prealign.study.definition import StudyRun
from megatron_prealign.study.records import StudyRecords
from megatron_prealign.study.sweeps import draw_sweep, is_logarithmic, labelled_values, sweep_table
from megatron_prealign.study.tables import result_tables

RUNS = [
    StudyRun(name="joint"),
    StudyRun(name="wide", at={"interval": 400.0}),
    StudyRun(name="narrow", control="shuffled", at={"interval": 10.0}),
    StudyRun(name="shuffled"),
    StudyRun(name="lost", at={"interval": 20.0}),
]


def records(directory: Path) -> StudyRecords:
    losses = {"joint": (4.0, 4.2), "wide": (3.9, 4.3), "narrow": (3.0, 3.4), "shuffled": (3.5, 3.5)}
    metrics = {
        (run, seed): [evaluation(1000, {"en": loss}, None if run == "shuffled" else 0.5 + 0.1 * (run == "narrow"))]
        for run, values in losses.items()
        for seed, loss in enumerate(values, start=1)
        if (run, seed) != ("wide", 2)
    }
    return records_of(study_of(directory, RUNS), metrics)


def test_table_ordered_by_value(tmp_path: Path) -> None:
    given = records(tmp_path)
    table = sweep_table(given.study, "interval", given.rows)
    assert table.header == [
        *("value", "run", "loss en", "P@1, trained words", "P@1, held-out words"),
        *("en against joint", "en against control"),
    ]
    assert table.rows == [
        ["10", "narrow", "3.200 ± 0.283", "0.600 ± 0.000", "0.300 ± 0.000", "-0.900 ± 0.141", "-0.300 ± 0.283"],
        ["20", "lost", "-", "-", "-", "-", "-"],
        [
            *("400", "wide", "3.900 (1 of 2 seeds)", "0.500 (1 of 2 seeds)", "0.250 (1 of 2 seeds)"),
            *("-0.100 (1 of 2 seeds)", "-"),
        ],
    ]


def test_no_column_of_controls_without_controls(tmp_path: Path) -> None:
    given = records_of(study_of(tmp_path, [RUNS[0], RUNS[1], RUNS[4]]), {("wide", 1): [evaluation(9, {"en": 1.0})]})
    table = sweep_table(given.study, "interval", given.rows)
    assert table.header == ["value", "run", "loss en", "en against joint"]
    assert table.rows[1] == ["400", "wide", "1.000 (1 of 2 seeds)", "-"]


def test_plot_has_points_bars_and_the_first_run_as_a_line(tmp_path: Path) -> None:
    given = records(tmp_path)
    figure = draw_sweep(given.study, "interval", given.rows)
    assert figure is not None
    loss, retrieval = figure.axes
    curve, level = (line for line in loss.lines if len(line.get_xdata()) == 2 and line.get_marker() != "_")
    # Of three points, one has no results.
    assert list(curve.get_xdata()) == [10.0, 400.0]
    assert list(curve.get_ydata()) == [pytest.approx(3.2), pytest.approx(3.9)]
    assert list(level.get_ydata()) == [pytest.approx(4.1)] * 2
    assert loss.get_xscale() == "log"
    # Trained and held-out words, each with the level of the first run.
    assert len([line for line in retrieval.lines if len(line.get_xdata()) == 2 and line.get_marker() != "_"]) == 4
    assert draw_sweep(given.study, "interval", []) is None


def test_runs_with_a_baseline_of_their_own(tmp_path: Path) -> None:
    runs = [
        StudyRun(name="joint"),
        StudyRun(name="method", at={"share": 5}),
        StudyRun(name="joint_1"),
        StudyRun(name="method_1", against="joint_1", at={"share": 1}),
    ]
    losses = {"joint": 4.0, "method": 3.5, "joint_1": 5.0, "method_1": 4.8}
    metrics = {(run, seed): [evaluation(9, {"en": loss})] for run, loss in losses.items() for seed in (1, 2)}
    given = records_of(study_of(tmp_path, runs), metrics)
    table = sweep_table(given.study, "share", given.rows)
    assert table.header[-1] == "en against the baseline"
    assert [(row[1], row[-1]) for row in table.rows] == [("method_1", "-0.200 ± 0.000"), ("method", "-0.500 ± 0.000")]
    main, differences, *_ = result_tables(given.study, given.rows)
    assert differences.title == "Loss against the baseline"
    assert [row[:2] for row in differences.rows] == [["method", "joint"], ["joint_1", "joint"], ["method_1", "joint_1"]]
    figure = draw_sweep(given.study, "share", given.rows)
    assert figure is not None
    curve, level = (line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_marker() != "_")
    assert (list(curve.get_ydata()), list(level.get_ydata())) == ([4.8, 3.5], [5.0, 4.0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 20.0], False), ([1.0, 21.0], True), ([0.0, 100.0], False), ([-1.0, 100.0], False), ([5e-4, 2e-2], True)],
)
def test_logarithmic_from_a_factor_of_twenty(values: list[float], expected: bool) -> None:
    assert is_logarithmic(values) == expected


def test_labels_of_the_axis_do_not_touch() -> None:
    assert labelled_values([0.001, 0.002, 0.0022, 0.003], 3.0) == [0.001, 0.002, 0.003]
    assert labelled_values([10.0, 20.0, 400.0], 3.0) == [10.0, 20.0, 400.0]
    assert labelled_values([1000.0, 1001.0, 10_000.0], 3.0) == [1000.0, 10_000.0]
