"""A save that is killed or fails at any change of the disk leaves an intact checkpoint."""

import dataclasses
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.messages import assert_facts
from support.tiny import Tiny, recipe_of
from support.workers import WorkerPool

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class KilledError(Exception):
    """Simulates SIGKILL: afterwards nothing this process does reaches the disk."""


class Disk:
    """Counts the changes that this process makes below a directory, and can make them fail."""

    _watching: "Disk | None" = None
    _hooked = False

    def __init__(self, directory: Path) -> None:
        self._directory = str(directory)
        self.changes: list[str] = []
        self._kill_at: int | None = None
        self._full_from: int | None = None

    @contextmanager
    def watching(self, *, kill_at: int | None = None, full_from: int | None = None) -> Iterator[None]:
        """Watches the directory.

        Args:
            kill_at: From this change on, every change raises `KilledError`.
            full_from: From this change on, the disk is full: files can be renamed and removed, not written.
        """
        self._kill_at, self._full_from = kill_at, full_from
        if not Disk._hooked:
            # An audit hook cannot be removed.
            sys.addaudithook(Disk._audit)
            Disk._hooked = True
        real, Disk._watching = os.fsync, self
        os.fsync = lambda descriptor: (self._change("fsync", needs_space=True), real(descriptor))[1]
        try:
            yield
        finally:
            Disk._watching, os.fsync = None, real

    @staticmethod
    def _audit(event: str, arguments: tuple[Any, ...]) -> None:
        watching = Disk._watching
        if watching is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            return
        path = str(arguments[0])
        if event == "open" and not arguments[2] & _WRITING:
            return
        # Paths relative to an open directory belong to a directory that is being removed.
        if path.startswith(watching._directory) or not path.startswith("/"):
            watching._change(f"{event} {path[len(watching._directory) :]}", needs_space=event in ("open", "os.mkdir"))

    def _change(self, what: str, *, needs_space: bool) -> None:
        number = len(self.changes)
        self.changes.append(what)
        if self._kill_at is not None and number >= self._kill_at:
            raise KilledError(what)
        if self._full_from is not None and number >= self._full_from and needs_space:
            raise OSError(28, "No space left on device")


class Saver:
    """Saves checkpoints of a run whose state is one tensor."""

    def __init__(self, values: dict[str, Any], root: Path) -> None:
        from megatron_prealign.recipe import ParallelSection
        from megatron_prealign.runtime.distributed import start

        self._recipe = recipe_of(values, root)
        self._runtime = start(ParallelSection(device="cpu"), seed=1)

    def save(self, directory: Path, step: int, keep: int) -> None:
        """Saves a checkpoint and waits for it."""
        import torch
        from megatron.core.dist_checkpointing import ShardedTensor

        from megatron_prealign.checkpoint.store import CheckpointStore
        from megatron_prealign.checkpoint.train_state import TrainState

        section = dataclasses.replace(self._recipe.checkpoint, directory=str(directory), keep=keep)
        store = CheckpointStore(
            dataclasses.replace(self._recipe, checkpoint=section),
            self._runtime,
            identity={
                "vocab_size": 8,
                "padded_vocab_size": 8,
                "tokenizer_fingerprint": "sha256:x",
                "model": {"num_layers": 1},
            },
            run={},
            huggingface={},
            versions={},
        )
        tensor = ShardedTensor.from_rank_offsets("tensor", torch.full((100,), float(step)))
        optimizer: Any = SimpleNamespace(sharded_state_dict=lambda model, metadata: {"tensor": tensor})
        state = TrainState(step=step)
        try:
            store.save([], optimizer, state, phase="language_model", consumed={}, blend={}, metrics={})
            store.finish()
        finally:
            store.finish_after_error()


def check(directory: Path) -> int:
    """Checks the directory like a new process: everything named like a checkpoint is intact, and `latest` names one.
    Returns its step."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_prealign.checkpoint.directory import latest_checkpoint
    from megatron_prealign.checkpoint.manifest import find_damage, read_manifest
    from megatron_prealign.checkpoint.sharded.load import load_sharded
    from megatron_prealign.checkpoint.state import read_state

    for checkpoint in directory.glob("step_*"):
        assert find_damage(checkpoint, read_manifest(checkpoint), checksums=True) == [], checkpoint
    newest = latest_checkpoint(directory)
    assert newest is not None
    step = int(read_state(newest)["train_state"]["step"])
    empty = {"optimizer": {"tensor": ShardedTensor.from_rank_offsets("tensor", torch.zeros(100))}}
    loaded = load_sharded(empty, newest)
    assert loaded["optimizer"]["tensor"].tolist() == [float(step)] * 100
    return step


def kill_everywhere(values: dict[str, Any], root: str, branch: bool, keep: int) -> tuple[list[str], list[int]]:
    """Runs in a worker: a save of step 2 is killed at each change of the disk. Returns the changes of an uninterrupted
    save, and the step of the checkpoint after each kill."""
    saver, base = Saver(values, Path(root)), Path(root) / "base"
    if branch:
        # An abandoned branch: the run was rolled back to step 1.
        saver.save(base, 2, keep=2)
    saver.save(base, 1, keep=2)
    steps, number = [], 0
    while True:
        directory = Path(root) / f"killed_{number}"
        shutil.copytree(base, directory)
        disk = Disk(directory)
        try:
            with disk.watching(kill_at=number):
                saver.save(directory, 2, keep)
        except KilledError:
            pass
        if len(disk.changes) <= number:
            return disk.changes, steps
        steps.append(check(directory))
        saver.save(directory, 3, keep=1)
        assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000003"], disk.changes[-1]
        assert check(directory) == 3
        shutil.rmtree(directory)
        number += 1


def fill_everywhere(values: dict[str, Any], root: str) -> list[tuple[str, int]]:
    """Runs in a worker: the disk is full from each change of a save of step 2 on. Returns each error message and the
    step of the checkpoint afterwards."""
    from megatron_prealign.errors import UserError

    saver, base = Saver(values, Path(root)), Path(root) / "base"
    saver.save(base, 1, keep=2)
    results: list[tuple[str, int]] = []
    while True:
        directory = Path(root) / f"full_{len(results)}"
        shutil.copytree(base, directory)
        disk, message = Disk(directory), ""
        try:
            with disk.watching(full_from=len(results)):
                saver.save(directory, 2, keep=2)
        except UserError as error:
            message = str(error)
        if len(disk.changes) <= len(results):
            return results
        results.append((message.replace(str(directory), "DIR"), check(directory)))
        saver.save(directory, 3, keep=1)
        assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000003"]
        shutil.rmtree(directory)


def write_with_a_limit(values: dict[str, Any], root: str, limit: int) -> str:
    """Runs in a worker: the operating system limits files to `limit` bytes; returns the error message."""
    import resource
    import signal

    from megatron_prealign.errors import UserError

    saver, directory = Saver(values, Path(root)), Path(root) / "checkpoints"
    saver.save(directory, 1, keep=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        saver.save(directory, 2, keep=2)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
        assert check(directory) == 1
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("branch", "keep"), [(False, 1), (True, 2)])
def test_killed_at_any_change_of_the_disk(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, branch: bool, keep: int
) -> None:
    [(changes, steps)] = workers.run(1, kill_everywhere, tiny.values(tmp_path), str(tmp_path), branch, keep)
    assert len(changes) > 30
    # Until `latest` is replaced it names the old checkpoint, afterwards the new one.
    replaced = next(number for number, change in enumerate(changes) if change == "os.rename /.latest.incomplete")
    assert steps == [1] * (replaced + 1) + [2] * (len(changes) - replaced - 1)
    renamed = changes.index("os.rename /.step_00000002.incomplete")
    manifest = changes.index("open /.step_00000002.incomplete/manifest.json")
    assert manifest < renamed < replaced
    # Everything is synced before a rename: the manifest and the directory; its parent directory and the pointer.
    assert changes[manifest + 1 : renamed].count("fsync") == 2
    assert changes[renamed + 1 : replaced].count("fsync") == 2
    # Only the previous checkpoint is removed, and only at the end.
    assert not any("removed" in change for change in changes[:replaced])
    assert any("removed" in change for change in changes[replaced:]) == (keep == 1)


@pytest.mark.slow
def test_full_from_any_change_of_the_disk(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    [results] = workers.run(1, fill_everywhere, tiny.values(tmp_path), str(tmp_path))
    assert len(results) > 30
    # Once `latest` is replaced, nothing needs space.
    [message] = {message for message, step in results if step == 1}
    facts = ("DIR/step_00000002", "No space left on device", "step_00000001", "checkpoint.directory")
    assert_facts(message, *facts)
    assert {message for message, step in results if step == 2} <= {"", message}
    assert results[0] == (message, 1)


def test_limit_on_the_size_of_a_file(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    [message] = workers.run(1, write_with_a_limit, tiny.values(tmp_path), str(tmp_path), 600)
    assert_facts(message, tmp_path / "checkpoints" / "step_00000002", "File too large")
    assert "\n" not in message
