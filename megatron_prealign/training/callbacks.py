"""Callbacks for periodic work: called at the start of a run, after each step, at the end of each phase and of the
run."""

import contextlib
import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from megatron_prealign import interrupts
from megatron_prealign.runtime import launcher
from megatron_prealign.text import duration

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer


logger = logging.getLogger(__name__)


class Callback:
    """Base class; every method does nothing. The trainer calls callbacks in the order of its list."""

    def on_start(self, trainer: "Trainer") -> None: ...

    def on_step(self, trainer: "Trainer") -> None: ...

    def on_phase_end(self, trainer: "Trainer") -> None: ...

    def on_end(self, trainer: "Trainer") -> None: ...

    def on_close(self, trainer: "Trainer") -> None:
        """Called last, also after an error: release what `on_start` acquired."""


class GarbageCollection(Callback):
    """Collects garbage on all ranks at the same step, since a rank that collects alone makes the others wait."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._was_enabled = gc.isenabled()

    def on_start(self, trainer: "Trainer") -> None:
        if self._interval:
            gc.disable()

    def on_step(self, trainer: "Trainer") -> None:
        if self._interval and trainer.state.step % self._interval == 0:
            gc.collect()

    def on_close(self, trainer: "Trainer") -> None:
        if self._interval and self._was_enabled:
            gc.enable()


class AsyncSaves(Protocol):
    """State of background saves that `StopOnRequest` depends on; implemented by `CheckpointStore`."""

    @property
    def failed(self) -> bool:
        """Whether the current save has failed on this rank."""

    @property
    def in_progress(self) -> bool:
        """Whether a save is being written, as seen by rank 0."""

    @property
    def longest_s(self) -> float:
        """Duration of the longest save so far in seconds, as seen by rank 0."""

    def finish(self) -> None:
        """Waits for the current save; raises on all ranks if it failed. Collective: call on all ranks."""


class StopOnRequest(Callback):
    """Saves and stops all ranks after the same step on SIGTERM, SIGINT or SIGUSR1 on any rank, or at the time limit on
    rank 0's clock; ends the run on all ranks together if a background save failed.

    The flags are summed over ranks asynchronously and read one step later, when the gradient norm has synchronised the
    host anyway.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, saves: AsyncSaves, *, exit_after_minutes: float | None = None, started_s: float = 0.0) -> None:
        """
        Args:
            exit_after_minutes: Time limit of the process including its last save; None for no limit.
            started_s: Start of the time limit, as `time.monotonic()`.
        """
        self._saves = saves
        self._limit_s = math.inf if exit_after_minutes is None else exit_after_minutes * 60
        self._started_s = started_s
        self._received = 0
        self._previous: Mapping[int, object] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._rank = 0
        self._step_s: float | None = None
        self._seconds = 0.0
        self._last_step_s: float | None = None
        self._longest_step_s = 0.0

    def on_start(self, trainer: "Trainer") -> None:
        self._rank = trainer.runtime.rank
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received += 1
        if self._rank:
            return
        name = signal.Signals(number).name
        if self._received == 1:
            text = f"{name} received: saving a checkpoint after this step or the next, then stopping"
            if self._step_s is not None:
                text += f" (a step takes about {duration(self._step_s)})"
        else:
            text = (
                f"{name} received again: still saving a checkpoint before stopping; SIGKILL would lose the last steps"
            )
        # Not through the logger, whose lock the interrupted code may hold. The reader of the output may have died.
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{text}\n".encode())

    def on_step(self, trainer: "Trainer") -> None:
        if self._last_step_s is not None:
            self._step_s = trainer.state.seconds - self._seconds
        self._seconds = trainer.state.seconds
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            signalled, late, failed = flags.tolist()
            if failed:
                self._saves.finish()
            if (signalled or late) and not trainer.state.stop_requested:
                trainer.state.stop_requested = True
                reason = "signal" if signalled else "training.exit_after_minutes"
                launcher.report_end()
                logger.info("stop requested (%s): stopping after step %d", reason, trainer.state.step)
        flags = torch.tensor(
            [float(self._received > 0), float(self._is_late()), float(self._saves.failed)],
            device=trainer.runtime.device,
        )
        self._pending = (dist.all_reduce(flags, async_op=True), flags)

    def _is_late(self) -> bool:
        """Whether rank 0 must stop now to finish saving within the limit, allowing for two more steps and the save."""
        now_s = time.monotonic()
        if self._last_step_s is not None:
            self._longest_step_s = max(self._longest_step_s, now_s - self._last_step_s)
        self._last_step_s = now_s
        # The next save may take 1.5 times as long as the longest; before the first one, assume 10 % of the limit.
        save_s = 1.5 * self._saves.longest_s or 0.1 * self._limit_s
        if self._saves.in_progress:
            # The last save waits for the current one.
            save_s *= 2
        return self._rank == 0 and now_s - self._started_s + 2 * self._longest_step_s + save_s > self._limit_s

    def on_close(self, trainer: "Trainer") -> None:
        # After a request the process ends; a signal on the way must not make a clean stop fail. The request may be of
        # another rank: the launcher's death reaches each within a second, not all at once.
        requested = self._received > 0 or trainer.state.stop_requested
        if not (requested and interrupts.ignore()):
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
        if self._pending is not None:
            self._pending[0].wait()
