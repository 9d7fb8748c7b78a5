"""Background saves of complete runs: training continues, errors are raised, signals and limits end a run in time."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.marks import slow_except
from support.messages import assert_facts
from support.tiny import VOCAB_SIZE, Tiny, recipe_of
from support.whole_runs import everything_in, language_model_values, records, run, steps_in, user_error_message, weights
from support.workers import WorkerError, WorkerPool

from megatron_prealign.files.lock import locked_directories
from megatron_prealign.training.callbacks import Callback, StopOnRequest


class BlockedSave(Callback):
    """Blocks writing the files of a checkpoint until training has reached a later step."""

    def __init__(self, blocked_step: int, until_step: int) -> None:
        self._blocked = f"step_{blocked_step:08d}"
        self._until = until_step
        self._released = threading.Event()
        self.steps_while_blocked: list[int] = []

    def write(self, real: Any, directory: Path, file: Any) -> Any:
        if self._blocked in directory.name:
            assert self._released.wait(60), "training did not continue"
        return real(directory, file)

    def on_step(self, trainer: Any) -> None:
        if not self._released.is_set():
            self.steps_while_blocked.append(trainer.state.step)
        if trainer.state.step == self._until:
            self._released.set()


def train_while_saving(values: dict[str, Any], directory: str, blocked: int, until: int) -> list[int]:
    """Runs in workers: steps done while the checkpoint of step `blocked` was being written."""
    from megatron_prealign.checkpoint.sharded import save as sharded_save
    from megatron_prealign.run.pretrain import pretrain

    real, save = sharded_save._write_file, BlockedSave(blocked, until)
    sharded_save._write_file = lambda *args: save.write(real, *args)
    try:
        pretrain(recipe_of(values, Path(directory)), leave_process_group=True, callbacks=[save])
    finally:
        sharded_save._write_file = real
    return save.steps_while_blocked


@pytest.mark.slow
def test_training_continues_and_the_checkpoint_is_of_the_requested_step(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path
) -> None:
    """Parameters, moments and counters change in place while the files are written; synchronous saves write the same
    files."""
    steps = []
    for name, asynchronous in (("async", True), ("sync", False)):
        directory = tmp_path / name
        values = language_model_values(tiny, directory, save_interval=2, keep=9, async_save=asynchronous)
        blocked = 2 if asynchronous else 99
        values["training"]["train_iters"] = 4
        steps.append(workers.run(2, train_while_saving, values, str(directory), blocked, 3, timeout_s=100))
    assert steps[0] == [[1, 2, 3]] * 2
    saved, expected = (tmp_path / name / "checkpoints" / "step_00000002" for name in ("async", "sync"))
    loaded, wanted = (workers.run(1, everything_in, str(directory))[0] for directory in (saved, expected))
    assert loaded.keys() == wanted.keys()
    assert sum(key.startswith("optimizer") for key in wanted) > 10
    for key, tensor in wanted.items():
        assert torch.equal(loaded[key], tensor), key
    # A synchronous save pauses training for its complete duration.
    paused = {name: records(tmp_path / name, "checkpoint")[("language_model", 2)] for name in ("async", "sync")}
    assert paused["async"]["paused_s"] < paused["async"]["seconds"]
    assert paused["sync"]["paused_s"] == paused["sync"]["seconds"]
    states = [json.loads((directory / "state.json").read_text()) for directory in (saved, expected)]
    for state in states:
        del state["saved_at"], state["train_state"]["seconds"]
    assert states[0] == states[1]


@pytest.mark.slow
def test_a_checkpoint_has_its_metrics_and_the_best_one_is_kept(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = language_model_values(
        tiny, tmp_path, save_interval=1, keep=2, keep_best="validation_loss/en", keep_every=3
    )
    values["training"]["eval_interval"] = 2
    run(workers, 1, values, tmp_path)
    evaluations = {step: line["validation_loss"] for (_, step), line in records(tmp_path, "evaluation").items()}
    assert list(evaluations) == [2, 4, 5]
    best = min(evaluations, key=lambda step: (evaluations[step]["en"], -step))
    assert steps_in(tmp_path) == ["latest", *(f"step_{step:08d}" for step in sorted({best, 3, 4, 5}))]
    third, fifth = (
        json.loads((tmp_path / "checkpoints" / f"step_{step:08d}" / "state.json").read_text()) for step in (3, 5)
    )
    # Only metrics of the same step.
    assert third["metrics"] == {}
    measured = {f"validation_loss/{name}": loss for name, loss in evaluations[5].items()}
    assert measured.items() < fifth["metrics"].items()
    retrieval = ("word_retrieval_p_at_1/en-en_clone", "word_retrieval_p_at_1_held_out/en-en_clone")
    classes = {
        f"validation_loss_words/{language}/{name}"
        for language in ("en", "en_clone")
        for name in ("trained", "held_out", "other")
    }
    assert fifth["metrics"].keys() == {*measured, *retrieval, *classes}
    assert fifth["kind"] == "run"
    assert fifth["versions"]["megatron-core"] != "not installed"
    assert fifth["saved_at"].endswith("+00:00")
    # The durations of the saves are recorded too.
    lines = records(tmp_path, "checkpoint")
    assert list(lines) == [("language_model", step) for step in range(1, 6)]
    for (_, step), line in lines.items():
        checkpoint = tmp_path / "checkpoints" / f"step_{step:08d}"
        assert 0 < line["paused_s"] < line["seconds"]
        assert line["waited_s"] >= 0
        if checkpoint.exists():
            assert line["bytes"] == sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def test_unknown_metric_is_refused(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        run(workers, 1, language_model_values(tiny, tmp_path / "run", keep_best="validation_loss/fr"), tmp_path / "run")
    assert_facts(
        user_error_message(caught),
        "checkpoint.keep_best",
        "validation_loss/fr",
        "validation_loss/en, validation_loss/en_clone, validation_loss_words/en/trained, ",
        "word_retrieval_p_at_1/en-en_clone, word_retrieval_p_at_1_held_out/en-en_clone",
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def train_on_a_disk_that_fills(values: dict[str, Any], directory: str, step: int, rank: int) -> None:
    """Runs in workers: one rank fails to write the checkpoint of `step`."""
    import torch.distributed as dist

    from megatron_prealign.checkpoint.sharded import save as sharded_save
    from megatron_prealign.run.pretrain import pretrain

    real = sharded_save._write_file

    def write(directory: Path, file: Any) -> Any:
        if f"step_{step:08d}" in directory.name and dist.get_rank() == rank:
            raise OSError(28, "No space left on device")
        return real(directory, file)

    class Slow(Callback):
        """Slows training down: the failure must be found by a step, not by the next save or the end of the run."""

        def on_step(self, trainer: Any) -> None:
            time.sleep(0.3)
            assert trainer.state.step <= step + 2, "the run continued"

    sharded_save._write_file = write
    try:
        pretrain(recipe_of(values, Path(directory)), leave_process_group=True, callbacks=[Slow()])
    finally:
        sharded_save._write_file = real


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "rank", "last"),
    [
        # The failure is communicated after the next step and read a step later, before the log line of that step.
        (2, 1, 3),
        # The end of the run waits for the save.
        (9, 0, 9),
    ],
)
def test_failure_in_the_background_ends_all_ranks(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, step: int, rank: int, last: int
) -> None:
    values = language_model_values(tiny, tmp_path, save_interval=step, keep=2)
    values["training"]["train_iters"] = 9
    with pytest.raises(WorkerError) as caught:
        workers.run(2, train_on_a_disk_that_fills, values, str(tmp_path), step, rank, timeout_s=60)
    message = user_error_message(caught)
    checkpoint = tmp_path / "checkpoints" / f"step_{step:08d}"
    assert_facts(message, checkpoint, "No space left on device", "last complete checkpoint: none")
    assert steps_in(tmp_path) == [f".step_{step:08d}.incomplete"]
    assert max(number for _, number in records(tmp_path)) == last


def fail_while_saving(values: dict[str, Any], directory: str) -> list[str]:
    """Runs in workers: a step fails while the checkpoint of the previous step is written. Returns the checkpoints that
    exist when the error is raised."""
    from megatron_prealign.checkpoint.sharded import save as sharded_save
    from megatron_prealign.run.pretrain import pretrain

    real = sharded_save._write_file

    def write(directory: Path, file: Any) -> Any:
        # Longer than raising an error takes.
        time.sleep(1.0)
        return real(directory, file)

    class Fails(Callback):
        def on_step(self, trainer: Any) -> None:
            if trainer.state.step == 3:
                raise ZeroDivisionError("on purpose")

    sharded_save._write_file = write
    try:
        pretrain(recipe_of(values, Path(directory)), leave_process_group=True, callbacks=[Fails()])
    except ZeroDivisionError:
        return steps_in(Path(directory))
    finally:
        sharded_save._write_file = real
    return []


@pytest.mark.slow
def test_run_that_fails_waits_for_the_save_in_progress(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = language_model_values(tiny, tmp_path, save_interval=2)
    [saved] = workers.run(1, fail_while_saving, values, str(tmp_path), timeout_s=60)
    assert saved == ["latest", "step_00000002"]


# Runs a recipe through the command line; the second process is killed during its first save.
DYING = """
import os, signal, sys
import torch.distributed as dist
from megatron_prealign import cli
from megatron_prealign.checkpoint.sharded import save as sharded_save
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(os.environ["RANK"]), world_size=2)
if os.environ["RANK"] == "1":
    sharded_save._write_file = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(cli.main(["pretrain", "--config", sys.argv[2]]))
"""


@pytest.mark.slow
def test_process_that_dies_while_saving_ends_the_other_with_an_error(tiny: Tiny, tmp_path: Path) -> None:
    # checkpoint.timeout_minutes is 30: the other process must not wait that long for a dead one.
    values = language_model_values(tiny, tmp_path, save_interval=1)
    values["training"]["train_iters"] = 200
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(values))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DYING, str(tmp_path / "store"), str(recipe)],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        _, stderr = processes[0].communicate(timeout=200)
        processes[1].communicate(timeout=10)
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode == 2, stderr
    last = stderr.splitlines()[-1]
    assert last.startswith("error: "), stderr
    assert_facts(last, "another process of this run has ended")
    assert "Traceback" not in stderr
    assert steps_in(tmp_path) == [".step_00000001.incomplete"]


class SignalAt(Callback):
    """Sends a signal to this process after a step, like a batch system."""

    def __init__(self, number: int, rank: int, step: int) -> None:
        self._at = (rank, step)
        self._number = number

    def on_step(self, trainer: Any) -> None:
        if (trainer.runtime.rank, trainer.state.step) == self._at:
            signal.raise_signal(self._number)
            signal.raise_signal(self._number)


def train_until_signal(
    values: dict[str, Any], directory: str, number: int, rank: int, step: int
) -> tuple[bool, int, str]:
    """Runs in workers."""
    from megatron_prealign.run.pretrain import pretrain

    callback = SignalAt(number, rank, step)
    state = pretrain(recipe_of(values, Path(directory)), leave_process_group=True, callbacks=[callback])
    return state.stop_requested, state.step, "alignment" if state.phase == 0 else "language_model"


@pytest.mark.parametrize(
    ("number", "rank", "step", "phase"),
    slow_except(
        [(signal.SIGUSR1, 1, 2, "alignment"), (signal.SIGINT, 0, 6, "language_model")],
        (signal.SIGINT, 0, 6, "language_model"),
    ),
)
def test_signals_save_and_end_the_run_in_both_phases(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, number: int, rank: int, step: int, phase: str
) -> None:
    values = copy.deepcopy(tiny.values(tmp_path))
    values["parallel"] = {"device": "cpu"}
    values["training"]["eval_samples"] = 2
    ends = workers.run(2, train_until_signal, values, str(tmp_path), number, rank, step)
    assert ends[0] == ends[1]
    stopped, last, at = ends[0]
    assert stopped and at == phase
    # The flag is communicated after a step and read a step later.
    assert step + 1 <= last <= step + 2
    newest = (tmp_path / "checkpoints" / "latest").read_text().strip()
    assert newest == f"step_{last:08d}"
    # There is no evaluation before the run ends: time is short.
    assert list(records(tmp_path, "evaluation")) == ([] if at == "alignment" else [("alignment", 5)])
    run(workers, 2, values, tmp_path)
    assert max(number for _, number in records(tmp_path)) == 10


@pytest.mark.slow
def test_time_limit_saves_and_ends_and_the_same_command_resumes(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path
) -> None:
    values = language_model_values(tiny, tmp_path, keep=1)
    values["training"]["exit_after_minutes"] = 1e-6
    steps = []
    for _ in range(3):
        run(workers, 2, values, tmp_path)
        steps.append(json.loads((tmp_path / "checkpoints" / "latest").read_text().strip()[5:].lstrip("0")))
    # Every start makes progress however short the limit is: one step to notice it, one to agree.
    assert steps == [2, 4, 5]
    assert [step for _, step in records(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rank", "longest_save_s", "in_progress", "elapsed_s", "late"),
    [
        # A limit of 1,000 s, steps of 10 s: room for two steps, and a tenth of the limit before a save was measured.
        (0, 0.0, False, 870, False),
        (0, 0.0, False, 890, True),
        # One and a half times a measured save.
        (0, 20.0, False, 940, False),
        (0, 20.0, False, 960, True),
        (0, 400.0, False, 390, True),
        # Twice that while a save is in progress.
        (0, 20.0, True, 910, False),
        (0, 20.0, True, 930, True),
        # The clocks of other ranks do not count.
        (1, 0.0, False, 2000, False),
    ],
)
def test_time_limit_leaves_room_for_two_steps_and_the_save(
    monkeypatch: pytest.MonkeyPatch, rank: int, longest_save_s: float, in_progress: bool, elapsed_s: float, late: bool
) -> None:
    now_s = 5000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    saves: Any = SimpleNamespace(failed=False, in_progress=in_progress, longest_s=longest_save_s)
    callback = StopOnRequest(saves, exit_after_minutes=1000 / 60, started_s=now_s - elapsed_s)
    callback._rank = rank
    callback._last_step_s = now_s - 10.0
    assert callback._is_late() == late


@pytest.mark.slow
def test_second_run_in_one_directory_is_refused(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = language_model_values(tiny, tmp_path / "run", directory=str(tmp_path / "checkpoints"))
    with locked_directories([tmp_path / "checkpoints"]), pytest.raises(WorkerError) as caught:
        run(workers, 2, values, tmp_path / "run")
    message = user_error_message(caught)
    assert_facts(message, tmp_path / "checkpoints", "another run", f"process {os.getpid()} on ")
    run(workers, 2, values, tmp_path / "run")
    assert steps_in(tmp_path) == ["latest", "step_00000005"]


@pytest.mark.slow
def test_overlapped_parameters_are_gathered_before_the_copy(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """Until the next forward pass each rank has only its own part of the updated parameters."""
    results = []
    for name, overlap in (("plain", False), ("overlap", True)):
        values = language_model_values(tiny, tmp_path / name, save_interval=2, keep=9)
        values["parallel"] |= {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": overlap,
            "overlap_param_gather": overlap,
        }
        values["training"]["train_iters"] = 3
        run(workers, 2, values, tmp_path / name)
        results.append(weights(workers, tmp_path / name, 2 * VOCAB_SIZE, "step_00000002"))
    for key, tensor in results[0].items():
        assert torch.equal(results[1][key], tensor), key
