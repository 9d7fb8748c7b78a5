"""A pool of worker processes that the multi-process tests share: importing Megatron-Core takes seconds a process.

Each task joins a gloo group of as many workers as it wants through a file, runs, and leaves the group again. A task
that does not answer in time ends the workers and fails, it never hangs the suite.
"""

import contextlib
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 120.0


def _work(rank: int, tasks: Any, results: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from megatron_prealign.runtime import log

    log.configure(rank)
    while True:
        task = tasks.get()
        if task is None:
            return
        number, world_size, store, function, arguments = task
        try:
            results.put((number, rank, True, _run(rank, world_size, store, function, arguments)))
        except BaseException as error:
            results.put((number, rank, False, (error_name(error), str(error), traceback.format_exc())))


def error_name(error: BaseException) -> str:
    return type(error).__name__


def _run(rank: int, world_size: int, store: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        return function(*arguments)
    finally:
        with contextlib.suppress(Exception):
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class WorkerError(AssertionError):
    """A task failed in a worker. `kind` and `message` are those of the error there, per rank."""

    def __init__(self, failures: dict[int, tuple[str, str, str]]) -> None:
        super().__init__("\n".join(f"[rank {rank}] {text}" for rank, (_, _, text) in sorted(failures.items())))
        self.failures = failures


class WorkerPool:
    """Starts workers when they are first wanted and keeps them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._context = multiprocessing.get_context("spawn")
        self._results: Any = self._context.Queue()
        self._workers: list[tuple[Any, Any]] = []
        self._number = 0

    def run(
        self, world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """Runs `function(*arguments)` on `world_size` ranks; returns each rank's result.

        Raises:
            WorkerError: it failed on some rank.
            TimeoutError: it did not end in time; the workers are then gone.
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
        answers: dict[int, Any] = {}
        failures: dict[int, tuple[str, str, str]] = {}
        deadline_s = time.monotonic() + timeout_s
        while len(answers) + len(failures) < world_size:
            try:
                number, rank, ok, result = self._results.get(timeout=max(0.1, min(1.0, deadline_s - time.monotonic())))
            except queue.Empty:
                dead = [rank for rank, (process, _) in enumerate(self._workers) if not process.is_alive()]
                if dead or time.monotonic() > deadline_s:
                    self.close()
                    raise TimeoutError(
                        f"ranks {sorted(set(range(world_size)) - set(answers) - set(failures))} did not answer within "
                        f"{timeout_s} s (dead workers: {dead}); errors so far: {failures}"
                    ) from None
                continue
            if number == self._number:
                (answers if ok else failures)[rank] = result
        if failures:
            raise WorkerError(failures)
        return [answers[rank] for rank in range(world_size)]

    def close(self) -> None:
        for process, _ in self._workers:
            process.terminate()
        for process, _ in self._workers:
            process.join(10)
        self._workers.clear()
