"""Callbacks restore the process state that they change; complete runs observed through a callback."""

import copy
import gc
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.messages import assert_facts
from support.tiny import Tiny, recipe_of
from support.whole_runs import records
from support.workers import WorkerError, WorkerPool

from megatron_prealign.runtime import launcher
from megatron_prealign.training.callbacks import Callback, GarbageCollection, StopOnRequest

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Samples of an alignment step and of a step of language-model training, and the sequence length.
ALIGNMENT_SAMPLES, SAMPLES, SEQ_LENGTH = 4, 8, 32


def trainer_at(step: int) -> Any:
    return SimpleNamespace(state=SimpleNamespace(step=step), runtime=SimpleNamespace(rank=0))


NO_SAVES: Any = SimpleNamespace(failed=False, in_progress=False, longest_s=0.0)


@pytest.fixture
def collections(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts requested full collections; restores the collector."""
    requested: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *args: requested.append(1) or 0)
    was_enabled = gc.isenabled()
    yield requested
    (gc.enable if was_enabled else gc.disable)()


def test_garbage_is_collected_at_the_interval_only(collections: list[int]) -> None:
    gc.enable()
    callback = GarbageCollection(3)
    assert gc.isenabled()
    callback.on_start(trainer_at(0))
    assert not gc.isenabled()
    at = []
    for step in range(1, 10):
        before = len(collections)
        callback.on_step(trainer_at(step))
        at += [step] * (len(collections) - before)
    assert at == [3, 6, 9]
    callback.on_close(trainer_at(9))
    assert gc.isenabled()


def test_disabled_garbage_collection_stays_disabled(collections: list[int]) -> None:
    gc.disable()
    callback = GarbageCollection(3)
    callback.on_start(trainer_at(0))
    callback.on_close(trainer_at(0))
    assert not gc.isenabled()


def test_interval_0_leaves_the_collector_alone(collections: list[int]) -> None:
    gc.enable()
    callback = GarbageCollection(0)
    callback.on_start(trainer_at(0))
    assert gc.isenabled()
    callback.on_step(trainer_at(100))
    assert collections == []
    callback.on_close(trainer_at(100))
    assert gc.isenabled()


def test_signal_handlers_are_restored_and_a_second_signal_is_reported(capfd: pytest.CaptureFixture[str]) -> None:
    def handler_before(number: int, frame: Any) -> None: ...

    before = [signal.getsignal(number) for number in SIGNALS]
    try:
        signal.signal(signal.SIGTERM, handler_before)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        callback = StopOnRequest(NO_SAVES)
        callback.on_start(trainer_at(0))
        assert all(signal.getsignal(number) == callback._receive for number in SIGNALS)
        # Signals are now only recorded and reported in one line.
        callback._step_s = 99.6
        signal.raise_signal(signal.SIGTERM)
        output = capfd.readouterr().err
        assert_facts(output, "SIGTERM", "saving", "stopping", "1.7 min")
        assert output.count("\n") == 1 and "SIGKILL" not in output
        signal.raise_signal(signal.SIGUSR1)
        output = capfd.readouterr().err
        assert_facts(output, "SIGUSR1 received again", "saving", "SIGKILL")
        assert output.count("\n") == 1
        callback.on_close(trainer_at(0))
        assert signal.getsignal(signal.SIGTERM) is handler_before
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


@pytest.mark.parametrize("signalled", [False, True])
def test_a_stop_that_another_rank_asked_for_reports_the_end_of_the_launcher(
    monkeypatch: pytest.MonkeyPatch, signalled: bool
) -> None:
    """Rank 1 may notice it first; the run may then end before the watch of rank 0 looks again."""
    work: Any = SimpleNamespace(wait=lambda: None)
    reports: list[bool] = []
    trainer = trainer_at(5)
    trainer.state.seconds, trainer.state.stop_requested = 1.0, False
    trainer.runtime.device = "cpu"
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flags, async_op: work)
    monkeypatch.setattr(launcher, "report_end", lambda: reports.append(trainer.state.stop_requested))
    callback = StopOnRequest(NO_SAVES)
    callback._pending = (work, torch.tensor([float(signalled), 0.0, 0.0]))
    callback.on_step(trainer)
    callback.on_step(trainer)
    assert trainer.state.stop_requested == signalled
    assert reports == [True] * signalled


class Recorder(Callback):
    """Records what a run does; optionally fails at a step."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.events: list[str] = []
        self.steps: list[dict[str, Any]] = []
        self._fail_at = fail_at

    def on_start(self, trainer: Any) -> None:
        self.events.append("start")

    def on_step(self, trainer: Any) -> None:
        optimizer = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])[0].optimizer
        self.steps.append(
            {
                "phase": trainer.phase.name,
                "step": trainer.state.step,
                "phase_step": trainer.state.phase_step,
                "lr": trainer.learning_rate,
                "adam_step": optimizer.param_groups[0]["step"],
                "consumed": trainer.state.consumed_samples,
                "tokens": trainer.state.tokens,
                "training": all(chunk.training for chunk in trainer.chunks),
                "collecting": gc.isenabled(),
            }
        )
        if trainer.state.step == self._fail_at:
            raise ZeroDivisionError("on purpose")

    def on_phase_end(self, trainer: Any) -> None:
        self.events.append(f"end of {trainer.phase.name} at {trainer.state.step}")

    def on_end(self, trainer: Any) -> None:
        self.events.append("end")

    def on_close(self, trainer: Any) -> None:
        self.events.append("close")


def recorded(values: dict[str, Any], directory: str, fail_at: int | None) -> dict[str, Any]:
    """Runs in a worker."""
    from megatron_prealign.run.pretrain import pretrain

    gc.enable()
    handlers = [signal.getsignal(number) for number in SIGNALS]
    recorder, error, final = Recorder(fail_at), None, None
    try:
        state = pretrain(recipe_of(values, Path(directory)), leave_process_group=True, callbacks=[recorder])
        final = state.to_dict()
    except ZeroDivisionError as caught:
        error = str(caught)
    return {
        "events": recorder.events,
        "steps": recorder.steps,
        "error": error,
        "state": final,
        "handlers_restored": handlers == [signal.getsignal(number) for number in SIGNALS],
        "collecting": gc.isenabled(),
    }


def values_for(tiny: Tiny, directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(tiny.values(directory))
    values["parallel"] = {"device": "cpu"}
    for name, changes in sections.items():
        values.setdefault(name, {}).update(changes)
    return values


@pytest.fixture(scope="module")
def two_phases(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("two_phases")
    values = values_for(
        tiny,
        directory,
        alignment={"lr_warmup_iters": 2, "lr_decay_style": "linear", "min_lr": 1e-4},
        optimizer={"lr_decay_style": "cosine", "lr_warmup_iters": 2},
        training={"eval_interval": 2},
    )
    result = workers.run(1, recorded, values, str(directory), None)[0]
    return {**result, "directory": directory}


def test_phases_follow_each_other(two_phases: dict[str, Any]) -> None:
    assert two_phases["events"] == [
        "start",
        "end of alignment at 5",
        "end of language_model at 10",
        "end",
        "close",
    ]
    steps = two_phases["steps"]
    assert [step["step"] for step in steps] == list(range(1, 11))
    assert [(step["phase"], step["phase_step"]) for step in steps] == [
        *(("alignment", number) for number in range(1, 6)),
        *(("language_model", number) for number in range(1, 6)),
    ]
    # Also after an evaluation.
    assert all(step["training"] for step in steps)
    assert not any(step["collecting"] for step in steps)


def test_each_phase_has_its_own_learning_rate_and_a_fresh_optimizer(two_phases: dict[str, Any]) -> None:
    steps = two_phases["steps"]
    decayed = [1e-3 - 9e-4 * done / 3 for done in (1, 2, 3)]
    cosine = [1e-3 * 0.75, 1e-3 * 0.25, 0.0]
    # 5 steps each: two of warm-up, three of decay. Double precision, in another order of operations.
    expected = [5e-4, 1e-3, *decayed, 5e-4, 1e-3, *cosine]
    assert [step["lr"] for step in steps] == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert [step["adam_step"] for step in steps] == [1, 2, 3, 4, 5] * 2


def test_samples_and_tokens_are_counted_across_phases(two_phases: dict[str, Any]) -> None:
    steps = two_phases["steps"]
    consumed = [ALIGNMENT_SAMPLES * number for number in range(1, 6)]
    # The second phase continues where the first one stopped: no sample repeats.
    later = [consumed[-1] + SAMPLES * number for number in range(1, 6)]
    assert [step["consumed"] for step in steps] == consumed + later
    grown = [after["tokens"] - before["tokens"] for before, after in zip(steps, steps[1:], strict=False)]
    assert all(each >= ALIGNMENT_SAMPLES * SEQ_LENGTH + 16 * 2 for each in grown[:4])
    assert grown[4:] == [SAMPLES * SEQ_LENGTH] * 5
    state = two_phases["state"]
    assert state["phase_start_tokens"] == steps[4]["tokens"]
    assert (state["phase"], state["phase_step"], state["step"]) == (1, 5, 10)


def test_evaluations_happen_at_the_interval_and_at_each_end(two_phases: dict[str, Any]) -> None:
    evaluated = list(records(two_phases["directory"], "evaluation"))
    assert evaluated == [("alignment", step) for step in (2, 4, 5)] + [("language_model", step) for step in (7, 9, 10)]


def test_process_state_is_restored(two_phases: dict[str, Any]) -> None:
    assert two_phases["handlers_restored"]
    assert two_phases["collecting"]


def test_process_state_is_restored_after_an_error(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    result = workers.run(1, recorded, values_for(tiny, tmp_path), str(tmp_path), 2)[0]
    assert result["error"] == "on purpose"
    assert result["events"] == ["start", "close"]
    assert result["handlers_restored"]
    assert result["collecting"]


@pytest.mark.slow
def test_optimizer_may_be_kept(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(
        tiny, tmp_path, alignment={"keep_optimizer": True, "train_iters": 2}, training={"train_iters": 2}
    )
    steps = workers.run(1, recorded, values, str(tmp_path), None)[0]["steps"]
    assert [step["adam_step"] for step in steps] == [1, 2, 3, 4]


def test_alignment_stops_at_its_goal(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(
        tiny, tmp_path, alignment={"stop_at_p_at_1": 1e-6}, training={"eval_interval": 2, "train_iters": 2}
    )
    result = workers.run(1, recorded, values, str(tmp_path), None)[0]
    assert result["events"][1:3] == ["end of alignment at 2", "end of language_model at 4"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    # The evaluation that ended the phase is also the one at its end.
    assert sum('"evaluation"' in line and '"alignment"' in line for line in lines) == 1
    # The goal applies to that phase only.
    assert not result["state"]["phase_done"]


@pytest.mark.slow
def test_unreached_goal_does_not_stop_the_phase(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(
        tiny,
        tmp_path,
        alignment={"stop_at_p_at_1": 1.0},
        optimizer={"lr_warmup_iters": 0},
        training={"eval_interval": 1, "train_iters": 1},
    )
    result = workers.run(1, recorded, values, str(tmp_path), None)[0]
    assert result["events"][1] == "end of alignment at 5"


@pytest.mark.slow
def test_token_budget_is_used_and_not_exceeded(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    step = SAMPLES * SEQ_LENGTH
    values = values_for(tiny, tmp_path, training={"train_iters": None, "train_tokens": 9 * step})
    state = workers.run(1, recorded, values, str(tmp_path), None)[0]["state"]
    assert 8 * step < state["tokens"] <= 9 * step
    # The words of the alignment phase count: its five steps have more tokens than their samples (2.5 steps).
    assert state["phase_start_tokens"] > 5 * ALIGNMENT_SAMPLES * SEQ_LENGTH
    assert state["phase_step"] == (9 * step - state["phase_start_tokens"]) // step


def test_no_budget_for_language_model_training_is_a_user_error(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    budget = (5 * ALIGNMENT_SAMPLES + SAMPLES) * SEQ_LENGTH
    values = values_for(tiny, tmp_path, training={"train_iters": None, "train_tokens": budget})
    with pytest.raises(WorkerError) as caught:
        workers.run(1, recorded, values, str(tmp_path), None)
    kind, message, _ = caught.value.failures[0]
    assert kind == "UserError"
    assert_facts(message, f"training.train_tokens is {budget}", "alignment phase", f"{SAMPLES} x {SEQ_LENGTH} tokens")
