"""Sharded files: written without helper processes, and every failure reaches every rank."""

import functools
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from workers import WorkerError, WorkerPool

ROWS = 4


def sharded(rank: int, world_size: int, *, filled: bool) -> dict[str, Any]:
    """A tensor split over ranks, an object of each rank, and a plain value."""
    import torch
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    values = torch.arange(ROWS * 3, dtype=torch.float32).reshape(ROWS, 3) + 100 * rank
    tensor = values if filled else torch.zeros_like(values)
    return {
        "tensor": ShardedTensor.from_rank_offsets("tensor", tensor, (0, rank, world_size)),
        "object": ShardedObject("object", {"rank": rank} if filled else None, (world_size,), (rank,), replica_id=0),
        "plain": {"step": 7},
    }


def started() -> tuple[int, int]:
    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.runtime.distributed import start

    runtime = start(ParallelSection(device="cpu"), seed=1)
    return runtime.rank, runtime.world_size


def save_and_load(folder: str) -> dict[str, Any]:
    import psutil

    from megatron_prealign.runtime import checkpoint_io, checkpoint_load

    rank, world_size = started()
    process = psutil.Process()
    before = {child.pid for child in process.children(recursive=True)}
    during: list[set[int]] = []
    with replaced_write_item(lambda real, *args, **kwargs: watch(process, during, real, *args, **kwargs)):
        checkpoint_io.save_sharded(sharded(rank, world_size, filled=True), Path(folder), timeout_s=60)
    after = {child.pid for child in process.children(recursive=True)}
    loaded = checkpoint_load.load_sharded(sharded(rank, world_size, filled=False), Path(folder))
    return {
        "tensor": loaded["tensor"].tolist(),
        "object": loaded["object"],
        "plain": loaded["plain"],
        "common": checkpoint_load.load_common(Path(folder))["plain"],
        "new_children": sorted((after | set().union(*during)) - before),
        "writes": len(during),
    }


def watch(process: Any, during: list[set[int]], real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    during.append({child.pid for child in process.children(recursive=True)})
    return real(*args, **kwargs)


class replaced_write_item:
    """Puts a function around torch's writer of one tensor, where Megatron-Core calls it."""

    def __init__(self, around: Callable[..., Any]) -> None:
        self._around = around

    def __enter__(self) -> None:
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        self._module, self._real = filesystem_async, filesystem_async._write_item

        # Megatron-Core looks at the function's signature before it calls it.
        @functools.wraps(self._real)
        def around(*args: Any, **kwargs: Any) -> Any:
            return self._around(self._real, *args, **kwargs)

        filesystem_async._write_item = around

    def __exit__(self, *_: object) -> None:
        self._module._write_item = self._real


def save_where_one_rank_fails(folder: str, failing: int) -> None:
    from megatron_prealign.runtime.checkpoint_io import save_sharded

    rank, world_size = started()

    def full(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if rank == failing:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    with replaced_write_item(full):
        save_sharded(sharded(rank, world_size, filled=True), Path(folder), timeout_s=60)


def save_where_one_rank_is_stuck(folder: str, stuck: int) -> None:
    from megatron_prealign.runtime.checkpoint_io import save_sharded

    rank, world_size = started()
    release = threading.Event()

    def wait(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if rank == stuck:
            release.wait(60)
        return real(*args, **kwargs)

    try:
        with replaced_write_item(wait):
            save_sharded(sharded(rank, world_size, filled=True), Path(folder), timeout_s=0.5)
    finally:
        release.set()


# A file system that never answers must not keep the process alive after the error.
STUCK = """
import threading
from megatron_prealign.runtime import checkpoint_io
checkpoint_io._write_bucket = lambda *args: threading.Event().wait(600)
try:
    checkpoint_io._write_all([], [None, None], 0.2)
except TimeoutError as error:
    print("TimeoutError:", error)
"""


@pytest.mark.parametrize("world_size", [1, 2])
def test_saved_state_comes_back_and_no_process_is_started(workers: WorkerPool, tmp_path: Path, world_size: int) -> None:
    results = workers.run(world_size, save_and_load, str(tmp_path))
    for rank, result in enumerate(results):
        first = [[100.0 * rank + 3 * row + column for column in range(3)] for row in range(ROWS)]
        assert result["tensor"] == first
        assert result["object"] == {"rank": rank}
        assert result["plain"] == result["common"] == {"step": 7}
        assert result["writes"] > 0
        assert result["new_children"] == []


@pytest.mark.parametrize("failing", [0, 1])
def test_failed_write_on_one_rank_is_an_error_on_all(workers: WorkerPool, tmp_path: Path, failing: int) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, save_where_one_rank_fails, str(tmp_path), failing, timeout_s=60)
    errors = {rank: (kind, message) for rank, (kind, message, _) in caught.value.failures.items()}
    assert set(errors) == {0, 1}
    assert errors[0] == errors[1]
    assert errors[0][0] == "UserError"
    assert errors[0][1].startswith(f"checkpoint {tmp_path} cannot be written: No space left on device; the previous")
    # Without this file nothing takes the folder for a checkpoint.
    assert not (tmp_path / "metadata.json").exists()


def test_stuck_write_on_one_rank_times_out_on_all(workers: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, save_where_one_rank_is_stuck, str(tmp_path), 1, timeout_s=30)
    errors = {rank: (kind, message) for rank, (kind, message, _) in caught.value.failures.items()}
    for kind, message in errors.values():
        assert kind == "UserError"
        assert "the file system did not take the checkpoint within" in message


def test_process_with_a_stuck_write_can_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TimeoutError: the file system did not take the checkpoint within")
