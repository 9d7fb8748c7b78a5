"""Trains the jobs of a study side by side, each in a process of its own, and reads their progress. Imports no torch."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_prealign import interrupts
from megatron_prealign.checkpoint.directory import latest_checkpoint
from megatron_prealign.checkpoint.resume.changes import is_finished
from megatron_prealign.checkpoint.state import read_state
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError
from megatron_prealign.files.lock import LOCK, LockHeldError, file_lock
from megatron_prealign.resources import available_cores
from megatron_prealign.runtime.launcher import STUDY_VARIABLE
from megatron_prealign.study.matrix import Job
from megatron_prealign.text import duration, plural
from megatron_prealign.training.metrics_file import METRICS_FILE, MetricsFile

_STOP_S = 120.0
_POLL_S = 0.2


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
    step = tokens = 0
    for record in MetricsFile(job.directory / METRICS_FILE).read("train"):
        # A line of another version or program may lack them; the tables say which it is.
        with suppress(KeyError, TypeError, ValueError):
            step, tokens = int(record["step"]), int(record["tokens"])
    if is_complete(job):
        return Progress(job, "complete", step, tokens)
    return Progress(job, "started" if step else "waiting", step, tokens)


def is_complete(job: Job) -> bool:
    """Whether the newest checkpoint is that of the last step."""
    return last_step(job) is not None


def last_step(job: Job) -> int | None:
    """The last step of a complete job; None if the newest checkpoint is not that of the last step."""
    checkpoint = latest_checkpoint(job.recipe.checkpoint_dir)
    if checkpoint is None:
        return None
    try:
        state = read_state(checkpoint)
        return TrainState.from_dict(state["train_state"]).step if is_finished(job.recipe, checkpoint, state) else None
    except (UserError, KeyError, TypeError, ValueError):
        # A damaged checkpoint is the run's own affair: it starts again and says what it finds.
        return None


def train_all(
    jobs: Sequence[Job], processes: int | None, say: Callable[[str], None], *, gpus: Sequence[str] = ()
) -> list[Job]:
    """Trains what is not complete; a job that fails does not end the others.

    Args:
        processes: Jobs at once; None for one per GPU, or per core without GPUs.
        say: Receives a line when a job starts and ends.
        gpus: Ids of GPUs, each job uses one; empty on a CPU.

    Returns:
        The jobs that are not complete: failed, or stopped before their last step.
    """
    todo = [job for job in jobs if not is_complete(job)]
    if len(todo) < len(jobs):
        say(f"{len(jobs) - len(todo)} of {len(jobs)} runs are complete")
    workers = max(1, min(processes or len(gpus) or available_cores(), len(todo) or 1))
    running = _Running(say, [gpus[worker % len(gpus)] for worker in range(workers)] if gpus else [])
    pool = ThreadPoolExecutor(workers)
    try:
        complete = list(pool.map(running.train, todo))
    except BaseException:
        running.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [job for job, done in zip(todo, complete, strict=True) if not done]


class _Running:
    """Processes of the jobs."""

    def __init__(self, say: Callable[[str], None], gpus: Sequence[str] = ()) -> None:
        """
        Args:
            gpus: Ids of the GPUs, one per job that runs at once; empty on a CPU.
        """
        self._say = say
        # Appending and popping are atomic.
        self._free_gpus = list(gpus)
        self._processes: list[tuple[Job, subprocess.Popen[bytes]]] = []
        self._stopped = False
        # No process starts once `stop` has begun.
        self._lock = threading.Lock()

    def train(self, job: Job) -> bool:
        """Returns whether the job is complete."""
        log = job.directory.with_suffix(".log")
        command = [sys.executable, "-m", "megatron_prealign", "pretrain", "--config", str(job.recipe_file)]
        started_s = time.monotonic()
        gpu = self._free_gpus.pop() if self._free_gpus else None
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._wait_for_lock(job)
            with log.open("ab") as output:
                begin = output.tell()
                process = self._start(job, command, output, gpu)
                if process is None:
                    return False
                self._say(f"{job.name}: $ {shlex.join(['megatron-prealign', *command[3:]])} >> {log}")
                status = process.wait()
        except OSError as error:
            self._say(f"{job.name}: failed: {error}")
            return False
        finally:
            if gpu is not None:
                self._free_gpus.append(gpu)
        if self._stopped:
            return False
        took = duration(time.monotonic() - started_s)
        if status:
            how = f"status {status}" if status > 0 else signal.Signals(-status).name
            self._say(f"{job.name}: failed with {how} after {took}: {_last_line(log, begin)} ({log})")
        elif not is_complete(job):
            self._say(f"{job.name}: stopped before its last step after {took}: {_last_line(log, begin)} ({log})")
            return False
        else:
            self._say(f"{job.name}: trained in {took}")
        return not status

    def _wait_for_lock(self, job: Job) -> None:
        """Waits while another process has the run directory locked, for at most two minutes.

        The runs of a killed study save before they end. A run that still finds a lock says which process holds it.
        """
        deadline_s = time.monotonic() + _STOP_S
        waiting = False
        while not self._stopped and (job.directory / LOCK).exists():
            try:
                with file_lock(job.directory / LOCK, wait=False):
                    return
            except LockHeldError as error:
                if time.monotonic() >= deadline_s:
                    return
                if not waiting:
                    self._say(f"{job.name}: waiting for {job.directory}, in use by another run ({error})")
                waiting = True
                time.sleep(_POLL_S)

    def _start(
        self, job: Job, command: Sequence[str], output: BinaryIO, gpu: str | None
    ) -> "subprocess.Popen[bytes] | None":
        """Starts a process; None after `stop`."""
        device = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        # A killed study cannot stop its runs: they watch it.
        watched = {STUDY_VARIABLE: str(os.getpid())}
        with self._lock:
            if self._stopped:
                return None
            # A session of its own: Ctrl-C reaches the study alone, which then stops the runs.
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1", **watched, **device},
                start_new_session=True,
            )
            self._processes.append((job, process))
            return process

    def stop(self) -> None:
        """Asks all runs to save and waits for them; kills those that need more than two minutes."""
        with self._lock:
            self._stopped = True
            # Another Ctrl-C must not leave runs behind.
            interrupts.ignore()
        remaining = [(job, process) for job, process in self._processes if process.poll() is None]
        for _, process in remaining:
            process.terminate()
        deadline_s = time.monotonic() + _STOP_S
        if remaining:
            # The terminal may be gone.
            with suppress(OSError):
                self._say(f"stopping {plural(len(remaining), 'run')}: they save, which may take {duration(_STOP_S)}")
        for job, process in remaining:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                with suppress(OSError):
                    self._say(f"{job.name}: killed, since it did not stop in {duration(_STOP_S)}")


def _last_line(log: Path, begin: int) -> str:
    """Last error in what a process has appended to a log from the byte `begin` on, or its last line."""
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1]
