"""Pool of worker processes shared by multi-process tests.

Workers are forked from a server that has imported Megatron-Core, since importing it takes four seconds of a core. Each
task joins a gloo group of the requested size through a file, runs, and leaves the group. A task that times out
terminates the workers and fails; it never hangs the suite.
"""

import contextlib
import gc
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0
# Imported once, by the server. An import that starts threads must not be among them: a fork would lose those threads.
_PRELOADED = ["megatron_prealign.run.pretrain", "megatron_prealign.run.evaluate"]


def _work(rank: int, tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from megatron_prealign.runtime import log

    log.configure(rank)
    # What is imported by now stays, so a collection after a task needs to look at that task alone.
    gc.freeze()
    while (task := _next(tasks)) is not None:
        number, world_size, store, function, arguments = task
        try:
            results.put((number, rank, True, _run(rank, world_size, store, function, arguments)))
        except BaseException as error:
            results.put((number, rank, False, (error_name(error), str(error), traceback.format_exc())))
        # A trainer is a cycle that holds its process groups, and each of the 40 groups of a run has threads of gloo:
        # without this, a process had 280 threads after the tests of some files.
        gc.collect()


def _next(tasks: Any) -> Any:
    """The next task, or None when the tests have ended, even by a signal that left no time to close the pool."""
    tests = multiprocessing.parent_process()
    while tests is not None and tests.is_alive():
        with contextlib.suppress(queue.Empty):
            return tasks.get(timeout=2.0)
    return None


def error_name(error: BaseException) -> str:
    return type(error).__name__


def _run(rank: int, world_size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    # A rank that ended at once would close connections that others are still making (seen in 1 of 30 empty tasks).
    dist.barrier()
    try:
        return function(*arguments)
    finally:
        with contextlib.suppress(Exception):
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class WorkerError(AssertionError):
    """A task failed in a worker; `failures` maps each failed rank to (kind, message, traceback)."""

    def __init__(self, failures: dict[int, tuple[str, str, str]]) -> None:
        super().__init__("\n".join(f"[rank {rank}] {text}" for rank, (_, _, text) in sorted(failures.items())))
        self.failures = failures


class WorkerPool:
    """Starts workers on first use and keeps them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOADED)
        self._results: Any = self._context.Queue()
        self._workers: list[tuple[Any, Any]] = []
        self._number = 0

    def run(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """Runs `function(*arguments)` on `world_size` ranks; returns each rank's result.

        Raises:
            WorkerError: It failed on some rank.
            TimeoutError: It did not finish in time; the workers are terminated.
        """
        while len(self._workers) < world_size:
            tasks = self._context.Queue()
            process = self._context.Process(target=_work, args=(len(self._workers), tasks, self._results), daemon=True)
            process.start()
            self._workers.append((process, tasks))
        self._number += 1
        store = self._directory / f"store_{self._number}"
        for _, tasks in self._workers[:world_size]:
            tasks.put((self._number, world_size, str(store), function, arguments))
        return self._collect(world_size, timeout_s)

    def _collect(self, world_size: int, timeout_s: float) -> list[Any]:
        outputs: dict[int, Any] = {}
        failures: dict[int, tuple[str, str, str]] = {}
        deadline_s = time.monotonic() + timeout_s
        while len(outputs) + len(failures) < world_size:
            try:
                number, rank, ok, result = self._results.get(timeout=max(0.1, min(1.0, deadline_s - time.monotonic())))
            except queue.Empty:
                dead = [rank for rank, (process, _) in enumerate(self._workers) if not process.is_alive()]
                if dead or time.monotonic() > deadline_s:
                    self.close()
                    raise TimeoutError(
                        f"ranks {sorted(set(range(world_size)) - set(outputs) - set(failures))} did not finish within "
                        f"{timeout_s} s (dead workers: {dead}); errors so far: {failures}"
                    ) from None
                continue
            if number == self._number:
                (outputs if ok else failures)[rank] = result
        if failures:
            raise WorkerError(failures)
        return [outputs[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process, _ in self._workers:
            process.terminate()
        for process, _ in self._workers:
            process.join(10)
        self._workers.clear()
