"""Trains the jobs of a study side by side, each in a process of its own, and reads their progress. Imports no torch."""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.checkpoint.directory import latest_checkpoint
from megatron_prealign.checkpoint.resume.changes import is_finished
from megatron_prealign.checkpoint.state import read_state
from megatron_prealign.errors import UserError
from megatron_prealign.study.matrix import Job
from megatron_prealign.text import duration
from megatron_prealign.training.metrics_file import METRICS_FILE, MetricsFile

_STOP_S = 120.0


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    job: Job
    state: str
    """`complete`, `started` or `waiting`."""
    step: int
    tokens: int


def progress(job: Job) -> Progress:
    """Reads how far a job is from its checkpoints and metrics."""
    last = next(iter(deque(MetricsFile(job.directory / METRICS_FILE).read("train"), maxlen=1)), None)
    step, tokens = (0, 0) if last is None else (int(last["step"]), int(last["tokens"]))
    if is_complete(job):
        return Progress(job, "complete", step, tokens)
    return Progress(job, "started" if step else "waiting", step, tokens)


def is_complete(job: Job) -> bool:
    """Whether the newest checkpoint is that of the last step."""
    checkpoint = latest_checkpoint(job.recipe.checkpoint_dir)
    try:
        return checkpoint is not None and is_finished(job.recipe, checkpoint, read_state(checkpoint))
    except (UserError, KeyError, TypeError, ValueError):
        # A damaged checkpoint is the run's own affair: it starts again and says what it finds.
        return False


def train_all(jobs: Sequence[Job], processes: int | None, say: Callable[[str], None]) -> list[Job]:
    """Trains what is not complete; a job that fails does not end the others.

    Args:
        processes: Jobs at once; None for one per core.
        say: Receives a line when a job starts and ends.

    Returns:
        The jobs that failed.
    """
    todo = [job for job in jobs if not is_complete(job)]
    if len(todo) < len(jobs):
        say(f"{len(jobs) - len(todo)} of {len(jobs)} runs are complete")
    running = _Running(say)
    pool = ThreadPoolExecutor(max(1, min(processes or os.cpu_count() or 1, len(todo) or 1)))
    try:
        statuses = list(pool.map(running.train, todo))
    except BaseException:
        running.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [job for job, status in zip(todo, statuses, strict=True) if status]


class _Running:
    """Processes of the jobs."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopped = threading.Event()

    def train(self, job: Job) -> int:
        """Returns the exit status of the job."""
        if self._stopped.is_set():
            return 0
        log = job.directory.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "megatron_prealign", "pretrain", "--config", str(job.recipe_file)]
        self._say(f"{job.name}: $ {shlex.join(['megatron-prealign', *command[3:]])} > {log}")
        started_s = time.monotonic()
        with log.open("ab") as output:
            # A session of its own: Ctrl-C reaches the study alone, which then stops the runs.
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            self._processes.append(process)
            if self._stopped.is_set():
                process.terminate()
            status = process.wait()
        took = duration(time.monotonic() - started_s)
        if self._stopped.is_set():
            return status
        if status:
            self._say(f"{job.name}: failed with status {status} after {took}: {_last_line(log)} ({log})")
        else:
            self._say(f"{job.name}: trained in {took}")
        return status

    def stop(self) -> None:
        """Asks all runs to save and waits for them."""
        self._stopped.set()
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        deadline_s = time.monotonic() + _STOP_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]
