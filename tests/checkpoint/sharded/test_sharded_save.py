"""Sharded saves: written without helper processes while tensors change; every failure is raised on every rank."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts
from support.workers import WorkerError, WorkerPool

from megatron_prealign.errors import UserError

ROWS = 4


def sharded(rank: int, world_size: int, *, filled: bool) -> dict[str, Any]:
    """A tensor sharded over ranks, a view of larger memory, an object of each rank, and a plain value."""
    import torch
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

    values = torch.arange(ROWS * 3, dtype=torch.float32).reshape(ROWS, 3) + 100 * rank
    tensor = values if filled else torch.zeros_like(values)
    memory = torch.full((100_000,), float(rank + 1 if filled else 0), dtype=torch.bfloat16)
    return {
        "tensor": ShardedTensor.from_rank_offsets("tensor", tensor, (0, rank, world_size)),
        "view": ShardedTensor.from_rank_offsets("view", memory[500:502], (0, rank, world_size)),
        "object": ShardedObject("object", {"rank": rank} if filled else None, (world_size,), (rank,), replica_id=0),
        "plain": {"step": 7, "settings": [1, 2]},
    }


def started() -> tuple[int, int]:
    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.runtime.distributed import start

    runtime = start(ParallelSection(device="cpu"), seed=1)
    return runtime.rank, runtime.world_size


def start_save(
    state: dict[str, Any], directory: str, *, timeout_s: float = 60, copy: bool = True, completed: Any = None
) -> Any:
    """Stages `state` and starts writing it; `completed` is called with the records of the files."""
    from megatron_prealign.checkpoint.sharded.save import BackgroundSave, HostBuffers, stage
    from megatron_prealign.checkpoint.sharded.target import Target

    target = Target(Path(directory), Path(directory).with_name("final"), "step_00000001")
    staged = stage(state, target, buffers=HostBuffers(), timeout_s=timeout_s, copy=copy)
    return BackgroundSave(staged, timeout_s=timeout_s, complete=completed or (lambda records: None))


def save_and_load(directory: str, copy: bool) -> dict[str, Any]:
    import psutil

    from megatron_prealign.checkpoint.manifest import FileRecord
    from megatron_prealign.checkpoint.sharded import load as sharded_load
    from megatron_prealign.files.checksum import file_checksum

    rank, world_size = started()
    process = psutil.Process()
    before = {child.pid for child in process.children(recursive=True)}
    during: list[set[int]] = []
    records: dict[str, tuple[int, str]] = {}

    def watch(real: Callable[..., Any], *args: Any) -> Any:
        during.append({child.pid for child in process.children(recursive=True)})
        return real(*args)

    state = sharded(rank, world_size, filled=True)
    with replaced_write_file(watch):
        writing = start_save(state, directory, copy=copy, completed=records.update)
        if copy:
            # What training does next.
            state["tensor"].data.fill_(-1)
            state["view"].data.fill_(-1)
            state["plain"]["settings"].append(3)
        writing.finish()
    after = {child.pid for child in process.children(recursive=True)}
    loaded = sharded_load.load_sharded(sharded(rank, world_size, filled=False), Path(directory))
    files = {path.name for path in Path(directory).iterdir()}
    return {
        "tensor": loaded["tensor"].tolist(),
        "view": loaded["view"].tolist(),
        "object": loaded["object"],
        "plain": loaded["plain"],
        "common": sharded_load.load_common(Path(directory))["plain"],
        "new_children": sorted((after | set().union(*during)) - before),
        "writes": len(during),
        "files": files,
        "records": records,
        "expected_records": {
            name: FileRecord(Path(directory, name).stat().st_size, file_checksum(Path(directory, name)))
            for name in records
        },
        "largest": max(path.stat().st_size for path in Path(directory).glob("*.distcp")),
    }


@contextmanager
def replaced_write_file(around: Callable[..., Any]) -> Iterator[None]:
    """Wraps the function that writes one file."""
    from megatron_prealign.checkpoint.sharded import save as sharded_save

    real = sharded_save._write_file
    sharded_save._write_file = lambda *args: around(real, *args)
    try:
        yield
    finally:
        sharded_save._write_file = real


def save_where_one_rank_fails(directory: str, failing: int, receipts: bool) -> None:
    from megatron_prealign.checkpoint.sharded.save import BackgroundSave

    rank, world_size = started()

    def full(real: Callable[..., Any], *args: Any) -> Any:
        if rank == failing:
            raise OSError(28, "No space left on device")
        return real(*args)

    real_receipt = BackgroundSave._write_receipt
    if not receipts:

        def silent(self: Any, content: Any, *, quietly: bool = False) -> None:
            if rank != failing:
                real_receipt(self, content, quietly=quietly)

        BackgroundSave._write_receipt = silent  # type: ignore[method-assign]
    try:
        with replaced_write_file(full):
            start_save(sharded(rank, world_size, filled=True), directory).finish()
    finally:
        BackgroundSave._write_receipt = real_receipt  # type: ignore[method-assign]


def wait_where_one_rank_fails(directory: str) -> str:
    """Returns the error that each rank raises without communication."""
    import torch.distributed as dist

    rank, world_size = started()

    def full(real: Callable[..., Any], *args: Any) -> Any:
        if rank == 1:
            raise OSError(28, "No space left on device")
        return real(*args)

    message = ""
    with replaced_write_file(full):
        writing = start_save(sharded(rank, world_size, filled=True), directory)
        try:
            writing.wait()
        except UserError as error:
            message = str(error)
        assert writing.failed and writing.is_done
    dist.barrier()
    return message


def wait_for_a_missing_receipt(directory: str) -> str:
    """Returns the error of rank 0 when rank 1 has only the receipt of an earlier save."""
    import torch.distributed as dist

    from megatron_prealign.checkpoint.sharded import save as sharded_save

    rank, world_size = started()
    target = sharded_save.Target(Path(directory), Path("final"), None)
    staged = sharded_save.stage(
        sharded(rank, world_size, filled=True), target, buffers=sharded_save.HostBuffers(), timeout_s=60
    )
    if rank:
        receipt = {"token": "another", "results": [], "files": {}}
        sharded_save._receipt(Path(directory), rank).write_text(json.dumps(receipt))
        dist.barrier()
        return ""
    dist.barrier()
    real, sharded_save._OTHERS_WITHIN_S = sharded_save._OTHERS_WITHIN_S, 0.1
    try:
        # With this timeout the test would run into its own limit.
        sharded_save.BackgroundSave(staged, timeout_s=1e6, complete=lambda records: None).wait_after_error()
    except UserError as error:
        return str(error)
    finally:
        sharded_save._OTHERS_WITHIN_S = real
    return "the checkpoint is complete"


def save_where_one_rank_is_stuck(directory: str, stuck: int) -> None:
    rank, world_size = started()
    release = threading.Event()

    def wait(real: Callable[..., Any], *args: Any) -> Any:
        if rank == stuck:
            release.wait(60)
        return real(*args)

    try:
        with replaced_write_file(wait):
            writing = start_save(sharded(rank, world_size, filled=True), directory, timeout_s=0.5)
            writing.finish()
    finally:
        release.set()


def save_on_local_disks(directory: str) -> None:
    """Each rank has its own directory, as on nodes with local disks."""
    from megatron_prealign.checkpoint.sharded import save as sharded_save

    rank, world_size = started()
    own = Path(directory) / str(rank)
    own.mkdir()
    if rank:
        # Left by an earlier attempt.
        (own / sharded_save._TOKEN).write_text("another")
    real, sharded_save._VISIBLE_WITHIN_S = sharded_save._VISIBLE_WITHIN_S, 0.2
    try:
        start_save(sharded(rank, world_size, filled=True), str(own))
    finally:
        sharded_save._VISIBLE_WITHIN_S = real


def save_where_the_disk_does_not_respond(directory: str, stuck: int) -> None:
    """The file system blocks before the save is planned."""
    from megatron_prealign.checkpoint.sharded import save as sharded_save

    rank, world_size = started()
    real, release = sharded_save._read_token, threading.Event()

    def wait(directory: Path) -> str:
        if rank == stuck:
            release.wait(60)
        return real(directory)

    sharded_save._read_token = wait
    try:
        start_save(sharded(rank, world_size, filled=True), directory, timeout_s=0.5)
    finally:
        sharded_save._read_token = real
        release.set()


# A file system that never responds must not keep the process alive after the error.
STUCK = """
import sys, threading
from pathlib import Path
from megatron.core.dist_checkpointing import ShardedTensor
import torch
from megatron_prealign.recipe import ParallelSection
from megatron_prealign.checkpoint.sharded import save as sharded_save
from megatron_prealign.runtime.distributed import start
start(ParallelSection(device="cpu"), seed=1)
sharded_save._write_file = lambda *args: threading.Event().wait(600)
target = sharded_save.Target(Path(sys.argv[1]), Path("final"), None)
state = {"tensor": ShardedTensor.from_rank_offsets("tensor", torch.zeros(3))}
staged = sharded_save.stage(state, target, buffers=sharded_save.HostBuffers(), timeout_s=9)
writing = sharded_save.BackgroundSave(staged, timeout_s=0.2, complete=print)
try:
    writing.finish()
except sharded_save.UserError as error:
    print("UserError:", error)
"""


@pytest.mark.parametrize(("world_size", "copy"), [(1, True), (2, True), (2, False)])
def test_saved_state_is_loaded_and_no_process_is_started(
    workers: WorkerPool, tmp_path: Path, world_size: int, copy: bool
) -> None:
    results = workers.run(world_size, save_and_load, str(tmp_path), copy)
    for rank, result in enumerate(results):
        first = [[100.0 * rank + 3 * row + column for column in range(3)] for row in range(ROWS)]
        assert result["tensor"] == first
        assert result["view"] == [rank + 1.0] * 2
        assert result["object"] == {"rank": rank}
        assert result["plain"] == result["common"] == {"step": 7, "settings": [1, 2]}
        assert result["writes"] > 0
        assert result["new_children"] == []
        # The token and the receipts are removed.
        others = {name for name in result["files"] if not name.endswith(".distcp")}
        assert others == {".metadata", "common.pt", "metadata.json"}
        # A view is written without its complete storage, which has 200,000 bytes.
        assert result["largest"] < 50_000
    records = results[0]["records"]
    assert records == results[0]["expected_records"]
    assert records.keys() == results[0]["files"] - {".metadata"}


def test_missing_receipt_is_an_error_before_the_timeout(workers: WorkerPool, tmp_path: Path) -> None:
    message, _ = workers.run(2, wait_for_a_missing_receipt, str(tmp_path), timeout_s=60)
    assert_facts(message, "checkpoint final", "rank 1", "last complete checkpoint: none")


@pytest.mark.parametrize("receipts", [True, False])
@pytest.mark.parametrize("failing", [0, 1])
def test_failed_write_on_one_rank_is_an_error_on_all(
    workers: WorkerPool, tmp_path: Path, failing: int, receipts: bool
) -> None:
    """Also if the full disk has no space for the receipt: long before the timeout of a minute."""
    directory = tmp_path / "working"
    directory.mkdir()
    with pytest.raises(WorkerError) as caught:
        workers.run(2, save_where_one_rank_fails, str(directory), failing, receipts, timeout_s=40)
    errors = {rank: (kind, message) for rank, (kind, message, _) in caught.value.failures.items()}
    assert set(errors) == {0, 1}
    assert errors[0] == errors[1]
    kind, message = errors[0]
    assert kind == "UserError"
    facts = ("No space left on device", "last complete checkpoint: step_00000001", "checkpoint.directory")
    assert_facts(message, tmp_path / "final", *facts)
    # Without this file the directory is not accepted as a checkpoint.
    assert not (directory / "metadata.json").exists()


def test_rank_0_reads_a_failure_from_the_receipt(workers: WorkerPool, tmp_path: Path) -> None:
    messages = workers.run(2, wait_where_one_rank_fails, str(tmp_path), timeout_s=40)
    assert messages[0] == messages[1]
    assert "No space left on device" in messages[0]


@pytest.mark.parametrize("stuck", [0, 1])
def test_stuck_write_on_one_rank_times_out_on_all(workers: WorkerPool, tmp_path: Path, stuck: int) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, save_where_one_rank_is_stuck, str(tmp_path), stuck, timeout_s=30)
    errors = {rank: (kind, message) for rank, (kind, message, _) in caught.value.failures.items()}
    assert set(errors) == {0, 1}
    for kind, message in errors.values():
        assert kind == "UserError"
        assert_facts(message, tmp_path.with_name("final"), "writing", "within 0 s", "checkpoint.timeout_minutes")


def test_disk_that_does_not_respond_before_the_copy_times_out(workers: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, save_where_the_disk_does_not_respond, str(tmp_path), 1, timeout_s=30)
    [(kind, message)] = {(kind, message) for kind, message, _ in caught.value.failures.values()}
    assert kind == "UserError"
    assert_facts(message, tmp_path.with_name("final"), "respond", "within 0 s", "checkpoint.timeout_minutes")


def test_disks_that_are_not_shared_are_refused(workers: WorkerPool, tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, save_on_local_disks, str(tmp_path), timeout_s=30)
    [(kind, message)] = {(kind, message) for kind, message, _ in caught.value.failures.values()}
    assert kind == "UserError"
    assert_facts(message, "rank 1", "rank 0", tmp_path, "checkpoint.directory", "nodes share")


@pytest.mark.slow
def test_process_with_a_stuck_write_can_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", STUCK, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert_facts(done.stdout, "UserError: ", "checkpoint final", "writing", "last complete checkpoint: none")
