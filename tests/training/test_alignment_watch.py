"""The alignment watch: when it measures, what it reports, and that it does not affect training.

`test_parallel_parity.py` compares its measurements in every layout.
"""

import copy
import json
import logging
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.messages import assert_facts, user_error
from support.tiny import Tiny, recipe_of
from support.whole_runs import records, run
from support.workers import WorkerError, WorkerPool

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.evaluation import watch as module
from megatron_prealign.evaluation.erasure import ErasureWarning
from megatron_prealign.evaluation.retrieval_metrics import METRICS
from megatron_prealign.evaluation.watch import AlignmentWatch
from megatron_prealign.evaluation.word_pairs import WordPairs
from megatron_prealign.recipe import AlignmentWatchSection
from megatron_prealign.run.validate import validate
from megatron_prealign.training.metrics_file import MetricsFile
from megatron_prealign.training.metrics_log import MetricsLog, MetricsSink
from megatron_prealign.training.tensorboard import TensorBoard

PAIRS = [WordPairs.from_pairs(("en", "de"), [((1,), (2,)), ((3,), (2,)), ((4,), (5,))])]
BY_LAYER = {"en-de": [0.5, 0.25], "de-en": [1.0, 0.5]}
STEPS, BORDER = 10, 5


def fake_retrieval() -> dict[str, dict[str, list[float]]]:
    """Metrics of two layers; the cosine of other pairs is NaN."""
    return {
        direction: {name: [math.nan] * 2 if name == "negative_cosine" else values for name in METRICS}
        for direction, values in BY_LAYER.items()
    }


class Stage:
    """A trainer without a model that records the calls of its phase's `on_alignment_watch`."""

    def __init__(self, step: int = 0) -> None:
        self.received: list[tuple[int, Any]] = []
        self.over = False
        self.state = TrainState(step=step, phase_step=step, tokens=10 * step, seconds=1.2345678)
        self.phase = SimpleNamespace(
            name="language_model",
            total_iters=lambda state: 20,
            expected_step_tokens=lambda: 0.0,
            is_over=lambda state: self.over,
            on_alignment_watch=lambda state, measured: self.received.append((state.step, measured)),
        )
        self.phases = [self.phase]
        self.recipe = SimpleNamespace(model=SimpleNamespace(num_layers=0), alignment_guard=None)
        self.runtime, self.chunks = None, []


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the measurement by fake metrics; returns the list of requested pairs."""
    requested: list[Any] = []

    def measure(runtime: Any, chunks: Any, pairs: Any, *, num_layers: int) -> Any:
        requested.append(pairs)
        return fake_retrieval()

    monkeypatch.setattr(module, "measure_retrieval", measure)
    return requested


def watching(directory: Path, interval: int, *, tensorboard: bool = False) -> AlignmentWatch:
    sinks: list[MetricsSink] = [MetricsFile(directory / "metrics.jsonl")]
    if tensorboard:
        sinks.append(TensorBoard(directory / "tensorboard"))
    return AlignmentWatch(AlignmentWatchSection(interval=interval), PAIRS, MetricsLog(sinks))


def written(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps_through(watch: AlignmentWatch, stage: Stage, last: int) -> None:
    while stage.state.step < last:
        stage.state.step += 1
        watch.on_step(stage)


def test_measures_at_the_start_and_at_multiples_of_the_interval(measured: list[Any], tmp_path: Path) -> None:
    watch, stage = watching(tmp_path, 3), Stage()
    watch.on_start(stage)
    steps_through(watch, stage, 8)
    assert [step for step, _ in stage.received] == [0, 3, 6]
    assert [line["step"] for line in written(tmp_path)] == [0, 3, 6]
    assert measured == [PAIRS] * 3
    watch.on_phase_end(stage)
    assert [step for step, _ in stage.received] == [0, 3, 6, 8]


def test_a_resumed_run_does_not_measure_at_its_start(measured: list[Any], tmp_path: Path) -> None:
    watch, stage = watching(tmp_path, 3), Stage(step=3)
    watch.on_start(stage)
    assert measured == []
    steps_through(watch, stage, 6)
    assert [step for step, _ in stage.received] == [6]


def test_the_last_step_of_a_phase_is_measured_once(measured: list[Any], tmp_path: Path) -> None:
    watch, stage = watching(tmp_path, 3), Stage(step=5)
    stage.state.step, stage.over = 6, True
    watch.on_step(stage)
    assert measured == []
    watch.on_phase_end(stage)
    assert [step for step, _ in stage.received] == [6]
    # A phase ended by the measurement itself is over only after `on_step`.
    stage.over = False
    steps_through(watch, stage, 9)
    stage.over = True
    watch.on_phase_end(stage)
    assert [step for step, _ in stage.received] == [6, 9]


def test_a_run_does_not_measure_after_a_stop_request(measured: list[Any], tmp_path: Path) -> None:
    watch, stage = watching(tmp_path, 3), Stage(step=2)
    stage.state.stop_requested = True
    steps_through(watch, stage, 4)
    assert measured == []


def test_what_is_written_reported_and_logged(
    measured: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch, stage = watching(tmp_path, 7), Stage()
    with caplog.at_level(logging.INFO):
        watch.on_start(stage)
    (line,) = written(tmp_path)
    # JSON has no NaN.
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert line == {
        "kind": "alignment_watch",
        "phase": "language_model",
        "step": 0,
        "tokens": 0,
        "seconds": 1.235,
        "groups": "held_out",
        "words": {"en-de": 3, "de-en": 2},
        "pairs": {
            direction: {name: [None] * 2 if name == "negative_cosine" else values for name in METRICS}
            for direction, values in BY_LAYER.items()
        },
    }
    ((_, received),) = stage.received
    assert received.keys() == BY_LAYER.keys()
    assert received["de-en"]["mrr"] == BY_LAYER["de-en"]
    (message,) = (message for message in caplog.messages if "step" in message)
    assert (message.count("0.38"), message.count("0.75")) == (3, 2)
    assert_facts(message, "step 0/20 (language_model 0/20)", "held-out", "en-de", "P@1 0.38", "0.75", "CSLS", "nan")
    (message,) = (message for message in caplog.messages if "step" not in message)
    assert_facts(message, "alignment watch", "held-out", "en-de 3")
    assert not (tmp_path / "tensorboard").exists()


def logged_values(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Each P@1 of the last watch line that measured something, followed by its value at the start if there is one."""
    line = [message for message in caplog.messages if "step" in message][-1]
    return re.findall(r"(?<!CSLS )P@1 ([\d.]+(?: \(start [\d.]+\))?)", line)


def test_lines_have_the_values_before_training(
    measured: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    watch, stage = watching(tmp_path, 3), Stage()
    watch.on_start(stage)
    assert logged_values(caplog) == ["0.38"]
    monkeypatch.setitem(BY_LAYER, "en-de", [1.0, 0.5])
    steps_through(watch, stage, 3)
    assert logged_values(caplog) == ["0.75 (start 0.38)"]
    # A resumed run reads them, also after a line that was truncated when its process was killed.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "alignment_wat\n[1]\n')
    watch, stage = watching(tmp_path, 3), Stage(step=3)
    watch.on_start(stage)
    steps_through(watch, stage, 6)
    assert logged_values(caplog) == ["0.75 (start 0.38)"]


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize(("guard", "advice"), [(None, "alignment_guard keeps it"), (object(), "lower alignment_guard")])
def test_alignment_that_training_erases_is_warned_of_once(
    measured: list[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    resumed: bool,
    guard: object,
    advice: str,
) -> None:
    watch, stage = watching(tmp_path, 3), Stage()
    stage.recipe.alignment_guard = guard
    watch.on_start(stage)
    # Of the alignment phase counts its end. The reverse direction never loses half.
    for layers in ([0.5, 0.5], [0.8, 0.6]):
        monkeypatch.setitem(BY_LAYER, "en-de", layers)
        stage.phase.name = "alignment"
        steps_through(watch, stage, stage.state.step + 3)
    stage.phase.name = "language_model"
    if resumed:
        stage = Stage(step=6)
        stage.recipe.alignment_guard = guard
        watch = watching(tmp_path, 3)
        watch.on_start(stage)
    monkeypatch.setitem(BY_LAYER, "en-de", [0.41, 0.31])
    steps_through(watch, stage, 9)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]
    monkeypatch.setitem(BY_LAYER, "en-de", [0.41, 0.29])
    steps_through(watch, stage, 15)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert_facts(warning, "step 12/", "en-de at layer out", "P@1 0.29", "from 0.60", advice)


def test_one_rank_warns_of_erasure(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    warning, recipe = ErasureWarning(), SimpleNamespace(alignment_guard=None)
    warning.check(recipe, "alignment", "step 1", {"en-de": {"p_at_1": [1.0]}})
    warning.check(recipe, "language_model", "step 2", {"en-de": {"p_at_1": [0.0]}})
    assert not caplog.records


def test_values_before_training_of_other_words_are_not_compared(
    measured: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    watching(tmp_path, 3).on_start(Stage())
    lines = written(tmp_path)
    lines[0]["words"]["en-de"] = 7
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    watch, stage = watching(tmp_path, 3), Stage(step=3)
    watch.on_start(stage)
    steps_through(watch, stage, 6)
    assert logged_values(caplog) == ["0.38"]


@pytest.mark.parametrize(
    "pairs",
    [None, [], 3, {}, {"en-de": {}}, {"de-en": [1]}, [[0.5]], [], [10**400], [math.inf], ["x"], [[]], 0.5],
)
def test_values_before_training_that_are_damaged_are_not_compared(
    measured: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, pairs: Any
) -> None:
    caplog.set_level(logging.INFO)
    watching(tmp_path, 3).on_start(Stage())
    (line,) = written(tmp_path)
    by_metric = line["pairs"]["de-en"]
    # A list stands for the values of one metric.
    line["pairs"] = {**line["pairs"], "de-en": {**by_metric, "p_at_1": pairs}} if isinstance(pairs, list) else pairs
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    watch, stage = watching(tmp_path, 3), Stage(step=3)
    watch.on_start(stage)
    steps_through(watch, stage, 6)
    assert logged_values(caplog) == ["0.38"]


def test_values_before_training_that_cannot_be_read_do_not_end_the_run(
    measured: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    watching(tmp_path, 3).on_start(Stage(step=3))
    assert_facts(caplog.messages[-1], "alignment watch", tmp_path / "metrics.jsonl")


def test_tensorboard_has_every_layer_and_the_mean(measured: list[Any], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watch, stage = watching(tmp_path, 2, tensorboard=True), Stage()
    watch.on_start(stage)
    steps_through(watch, stage, 2)
    watch._metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    # Five metrics that are not NaN, two directions, two layers and their mean.
    assert len(tags) == 5 * 2 * 3
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    assert scalars["alignment_watch_p_at_1/de-en/0"] == [(0, 1.0), (2, 1.0)]
    assert scalars["alignment_watch_mrr/en-de/mean"] == [(0, 0.375), (2, 0.375)]


def values_for(tiny: Tiny, directory: Path, watch: dict[str, Any] | None, **parallel: Any) -> dict[str, Any]:
    values = copy.deepcopy(tiny.values(directory))
    values["parallel"] = {"device": "cpu", **parallel}
    if watch is not None:
        values["alignment_watch"] = watch
    return values


WATCH = {"interval": 4, "words": 40, "groups": "trained"}


@pytest.fixture(scope="module")
def one(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A watched run of one process, with a checkpoint after every step."""
    directory = tmp_path_factory.mktemp("watched")
    values = values_for(tiny, directory, WATCH)
    values["checkpoint"] = {"save_interval": 1, "keep": 100}
    run(workers, 1, values, directory)
    return directory


def test_a_run_is_watched_through_both_phases(one: Path) -> None:
    actual = records(one, "alignment_watch")
    assert list(actual) == [
        *(("alignment", step) for step in (0, 4, BORDER)),
        *(("language_model", step) for step in (8, STEPS)),
    ]
    trained = records(one)
    for (phase, step), line in actual.items():
        assert line["pairs"].keys() == line["words"].keys() == {"en-en_clone", "en_clone-en"}
        for by_name in line["pairs"].values():
            assert list(by_name) == list(METRICS)
            assert all(len(values) == 6 for values in by_name.values())
        assert line["groups"] == "trained"
        assert line["words"] == {"en-en_clone": 40, "en_clone-en": 40}
        if step:
            # Measured at the current training step, and its time does not count as training time.
            assert line["tokens"] == trained[phase, step]["tokens"]
            assert line["seconds"] == trained[phase, step]["seconds"]
    cosine = [line["pairs"]["en-en_clone"]["positive_cosine"] for line in actual.values()]
    # Alignment brings translations together at every layer; an unrelated metric would not rise.
    assert all(after > before for before, after in zip(cosine[0], cosine[2], strict=True))


def test_it_measures_what_an_evaluation_measures(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(tiny, tmp_path, {"interval": 3, "words": 50})
    values["training"].update(eval_interval=3, train_iters=3)
    del values["alignment"]
    values["code_switch"] = None
    run(workers, 1, values, tmp_path)
    watched, evaluated = records(tmp_path, "alignment_watch"), records(tmp_path, "evaluation")
    # Also without an alignment phase, as in a joint baseline.
    assert list(watched) == [("language_model", 0), ("language_model", 3)]
    last = watched["language_model", 3]
    held_out = evaluated["language_model", 3]["word_retrieval_p_at_1_held_out"]
    assert list(held_out) == ["en-en_clone"]
    assert held_out["en-en_clone"] == last["pairs"]["en-en_clone"]["p_at_1"]
    assert last["groups"] == "held_out"


@pytest.mark.slow
def test_training_is_the_same_without_the_watch(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """With overlap, under which a measurement gathers parameters."""
    runs = []
    for name, watch in (("with", {**WATCH, "interval": 1}), ("without", None)):
        values = values_for(tiny, tmp_path / name, watch, overlap_grad_reduce=True, overlap_param_gather=True)
        # Detects random numbers drawn by the watch and a model left in eval mode.
        values["model"].update(hidden_dropout=0.1, attention_dropout=0.1)
        run(workers, 2, values, tmp_path / name)
        runs.append(records(tmp_path / name))
    assert len(runs[0]) == STEPS
    for key, line in runs[0].items():
        for name in ("loss", "lm_loss", "grad_norm", "alignment_loss", "switched_words", "tokens"):
            assert line.get(name) == runs[1][key].get(name), (key, name)


@pytest.mark.slow
def test_a_resumed_run_continues_the_records(workers: WorkerPool, tiny: Tiny, tmp_path: Path, one: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(one / "checkpoints" / "step_00000004", checkpoints / "step_00000004")
    (checkpoints / "latest").write_text("step_00000004")
    run(workers, 1, values_for(tiny, tmp_path, WATCH), tmp_path)
    actual, uninterrupted = records(tmp_path, "alignment_watch"), records(one, "alignment_watch")
    assert list(actual) == [("alignment", BORDER), ("language_model", 8), ("language_model", STEPS)]
    for key, line in actual.items():
        assert line["pairs"] == uninterrupted[key]["pairs"]


def test_too_few_words_in_the_table_end_the_run_before_it_starts(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path
) -> None:
    values = values_for(tiny, tmp_path, {"interval": 1})
    values["dictionary"]["held_out_fraction"] = 1e-9
    facts = ("alignment_watch.groups is held_out", "these 0 ")
    with user_error(*facts):
        validate(recipe_of(values, tmp_path))
    with pytest.raises(WorkerError) as caught:
        run(workers, 1, values, tmp_path)
    kind, message, _ = caught.value.failures[0]
    assert kind == "UserError"
    assert_facts(message, *facts)
    assert not (tmp_path / "metrics.jsonl").exists()
