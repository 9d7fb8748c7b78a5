"""Writes sharded state through Megatron-Core's `dist_checkpointing`, without its helper processes.

Megatron-Core 0.16.1 writes through forked processes and a manager process, and waits without end when one of them dies.
Here each rank writes its own files in threads of its own process, so an error comes back as an error, and a file
system that stops answering ends in a timeout.
"""

import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_prealign.disk import sync_file
from megatron_prealign.errors import UserError
from megatron_prealign.runtime.agreement import all_ranks_ok, on_every_rank, on_rank_zero

# Optimizer state in a form that loads at any other TP, PP and DP size (Megatron-Core's default form loads at the same
# DP only), gathered over gloo on the first data-parallel rank alone: the others need no host memory for the whole
# stage's state while saving.
OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_BACKEND = CheckpointingConfig("torch_dist", 1)
_WRITER_THREADS = 2


@contextmanager
def disk_errors_as_mistakes(checkpoint: Path) -> Iterator[None]:
    """Turns what a full, read-only or broken disk raises while `checkpoint` is written into a `UserError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise UserError(
            f"checkpoint {checkpoint} cannot be written: {reason}; the previous checkpoint stays, mend the disk or "
            "choose another checkpoint.directory and start the same command again"
        ) from error


def _disk_error(error: BaseException | None) -> str | None:
    """The reason, if `error` comes from the disk. torch reports a short write as a RuntimeError of its own."""
    text = str(error)
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return "the disk took only a part of a file (is it full?)" if "PytorchStreamWriter" in text else None


class _Count:
    """Stands in for the queue by which a writer process would say that it is done."""

    def get(self) -> None: ...

    def task_done(self) -> None: ...


def _write_bucket(transforms: list[Any], index: int, bucket: Any) -> Any:
    """Writes and fsyncs one file; returns Megatron-Core's write results."""
    results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    FileSystemWriterAsync.write_preloaded_data(
        transforms,
        local_proc_idx=index,
        write_bucket=bucket,
        results_queue=results,
        count_queue=_Count(),
        use_fsync=True,
    )
    _, written = results.get_nowait()
    if isinstance(written, Exception):
        raise written
    return written


def _write_all(transforms: list[Any], buckets: Sequence[Any], timeout_s: float) -> dict[int, Any]:
    results: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def write(index: int, bucket: Any) -> None:
        try:
            results.put((index, _write_bucket(transforms, index, bucket)))
        except Exception as error:
            results.put((index, error))

    for index, bucket in enumerate(buckets):
        # The interpreter joins the threads of a pool when it ends, and a write that never returns would keep the
        # process alive after the timeout: these threads end with it.
        name = f"checkpoint-writer-{index}"
        threading.Thread(target=write, args=(index, bucket), name=name, daemon=True).start()
    deadline_s = time.monotonic() + timeout_s
    written: dict[int, Any] = {}
    while len(written) < len(buckets):
        try:
            index, result = results.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty as error:
            raise TimeoutError(f"the file system did not take the checkpoint within {timeout_s:.0f} s") from error
        if isinstance(result, Exception):
            raise result
        written[index] = result
    return written


class _Strategy(TorchDistSaveShardedStrategy):
    """Megatron-Core's way of planning a save; keeps what is needed to complete it here."""

    writer: FileSystemWriterAsync
    global_metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.global_metadata = writer, save_state_dict_ret[1]
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


def save_sharded(state: dict[str, Any], directory: Path, *, timeout_s: float, name: Path | None = None) -> None:
    """Saves `state` (sharded tensors and plain values) into the existing, empty folder `directory`.

    Takes part: all ranks. Every rank raises if any rank's write fails or times out; the folder is then incomplete.
    Megatron-Core writes its small files on the first rank between collectives, where an error leaves the other ranks
    waiting: here each is written by itself, and the ranks agree afterwards.

    Args:
        name: what messages call the checkpoint, when it is not `directory`.

    Raises:
        UserError: the disk is full, read-only, not shared by all ranks, or did not answer within `timeout_s`.
    """
    name = name or directory
    sharded, common = save_preprocess(state)
    on_every_rank(f"saving {name}", lambda: _check_folder(directory, name))
    on_rank_zero(f"saving {name}", lambda: _write_common(common, directory, name))
    # The module-level queue would otherwise start a manager process to carry results between processes.
    filesystem_async._results_queue = queue.Queue()
    strategy = _Strategy(_BACKEND.sharded_backend, _BACKEND.sharded_backend_version, thread_count=_WRITER_THREADS)
    request = strategy.async_save(sharded, directory)
    written: dict[int, Any] = {}
    error: Exception | None = None
    try:
        if request.async_fn is not None:
            with disk_errors_as_mistakes(name):
                # `async_fn` would start the writer processes: its first bound argument is all that is needed of it.
                written = _write_all(request.async_fn.args[0], request.preload_fn(), timeout_s)
    except Exception as caught:
        error = caught
    all_ranks_ok(error, f"saving the checkpoint {name}")
    own = list(chain.from_iterable(written.values()))
    results: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, results)
    on_rank_zero(f"saving {name}", lambda: _write_metadata(strategy, results, directory, name))


def _check_folder(directory: Path, name: Path) -> None:
    if not directory.is_dir():
        raise UserError(
            f"checkpoint {name} cannot be written: process {dist.get_rank()} does not see {directory}; "
            "checkpoint.directory must lie on a disk that all nodes share"
        )


def _write_common(common: dict[str, Any], directory: Path, name: Path) -> None:
    with disk_errors_as_mistakes(name), (directory / COMMON_STATE_FNAME).open("wb") as file:
        torch.save(common, file)
        file.flush()
        os.fsync(file.fileno())


def _write_metadata(strategy: _Strategy, results: Any, directory: Path, name: Path) -> None:
    with disk_errors_as_mistakes(name):
        strategy.writer.finish(strategy.global_metadata, results)
        # Last: nothing takes a folder without it for a checkpoint.
        save_config(_BACKEND, str(directory))
        sync_file(directory / CONFIG_FNAME)
