"""Callback that profiles a few steps: a Chrome trace and, on a GPU, a snapshot of the memory, both for every rank."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity

from megatron_prealign.training.callbacks import Callback

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer

logger = logging.getLogger(__name__)

# Allocations and frees that a memory snapshot keeps, the newest ones; torch keeps all by default.
_MEMORY_EVENTS = 1_000_000


class Profile(Callback):
    """Profiles the steps from the first to the last one, both included, counted over all phases.

    Evaluations and saves between them are part of the profile. A run that starts between the two steps, or is stopped
    there, profiles the steps that it runs. An error of the profiler is logged and does not end the run.
    """

    def __init__(self, steps: Sequence[int], directory: Path) -> None:
        """
        Args:
            steps: First and last step, the first step of a run being 1.
            directory: Directory to write to; created if missing.
        """
        self._first, self._last = steps
        self._directory = directory
        self._profiler: torch.profiler.profile | None = None
        self._started_at = 0
        self._failed = False

    def on_start(self, trainer: "Trainer") -> None:
        self._start_if_due(trainer)

    def on_step(self, trainer: "Trainer") -> None:
        if self._profiler is not None and trainer.state.step >= self._last:
            self._write(trainer)
        self._start_if_due(trainer)

    def on_end(self, trainer: "Trainer") -> None:
        step, stopped = trainer.state.step, trainer.state.stop_requested
        if step < self._first and not stopped:
            logger.warning("logging.profile_steps starts at step %d, but the run ended at step %d", self._first, step)

    def on_close(self, trainer: "Trainer") -> None:
        if self._profiler is not None:
            self._write(trainer)

    def _start_if_due(self, trainer: "Trainer") -> None:
        due = self._first <= trainer.state.step + 1 <= self._last
        if not due or self._profiler is not None or self._failed:
            return
        activities, on_gpu = [ProfilerActivity.CPU], trainer.runtime.device.type == "cuda"
        if on_gpu:
            activities.append(ProfilerActivity.CUDA)
        profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        try:
            if on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
            profiler.start()
        except Exception as error:
            self._fail(error)
            return
        self._profiler, self._started_at = profiler, trainer.state.step + 1

    def _write(self, trainer: "Trainer") -> None:
        """Stops the profiler and writes what it has recorded."""
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        runtime = trainer.runtime
        name = f"steps_{self._started_at}-{trainer.state.step}_rank_{runtime.rank}"
        try:
            profiler.stop()
            self._directory.mkdir(parents=True, exist_ok=True)
            # torch compresses by the suffix, so a temporary file must have it, too.
            with TemporaryDirectory(dir=self._directory, prefix=".") as temporary:
                profiler.export_chrome_trace(f"{temporary}/{name}.json.gz")
                if runtime.device.type == "cuda":
                    torch.cuda.memory._dump_snapshot(f"{temporary}/{name}_memory.pickle")
                for file in os.listdir(temporary):
                    os.replace(f"{temporary}/{file}", self._directory / file)
        except Exception as error:
            self._fail(error)
        else:
            logger.info("profile of steps %d to %d: %s", self._started_at, trainer.state.step, self._directory)
        finally:
            if runtime.device.type == "cuda":
                torch.cuda.memory._record_memory_history(enabled=None)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        logger.warning("no profile: %s: %s; training continues", type(error).__name__, " ".join(str(error).split()))
