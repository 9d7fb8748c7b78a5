"""Writes and reads sharded state through Megatron-Core's `dist_checkpointing`, without its helper processes.

Megatron-Core 0.16.1 writes through forked processes and a manager process, and waits without end when one of them dies.
Here each rank writes its own files in threads of its own process, so an error comes back as an error, and a file
system that stops answering ends in a timeout.
"""

import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_prealign.runtime.agreement import all_ranks_ok

# Optimizer state in a form that loads at any other TP, PP and DP size (Megatron-Core's default form loads at the same
# DP only).
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
_WRITER_THREADS = 2


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


def save_sharded(state: dict[str, Any], directory: Path, *, timeout_s: float) -> None:
    """Saves `state` (sharded tensors and plain values) into the existing, empty folder `directory`.

    Takes part: all ranks. Every rank raises if any rank's write fails or times out; the folder is then incomplete.
    """
    # The module-level queue would otherwise start a manager process to carry results between processes.
    filesystem_async._results_queue = queue.Queue()
    strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=_WRITER_THREADS)
    request = dist_checkpointing.save(
        state, str(directory), sharded_strategy=strategy, validate_access_integrity=True, async_sharded_save=True
    )
    error: Exception | None = None
    if request.async_fn is not None:
        try:
            # `async_fn` would start the writer processes: its first bound argument is all that is needed of it.
            transforms = request.async_fn.args[0]
            request.async_fn_args[2].put(_write_all(transforms, request.preload_fn(), timeout_s))
        except Exception as caught:
            error = caught
    all_ranks_ok(error, f"saving the checkpoint {directory}")
    for finalize in request.finalize_fns:
        finalize()
    dist.barrier()


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fills `state` (built for this run's layout) from a folder written by `save_sharded` in any layout.

    Takes part: all ranks.
    """
    return dist_checkpointing.load(state, str(directory))


def load_common(directory: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, without its tensors. Needs no other rank."""
    return dist_checkpointing.load_common_state_dict(str(directory))
