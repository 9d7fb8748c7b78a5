"""Everything periodic: a callback sees the run begin, each step, each end of a phase and the end of the run."""

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
        """Called last, also after an error: give back what `on_start` took."""


class GarbageCollection(Callback):
    """Collects on all ranks at the same step: a rank that collects while the others compute makes them all wait."""

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


class Saves(Protocol):
    """What a run's end must know of its checkpoints."""

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way cannot succeed."""

    @property
    def in_progress(self) -> bool:
        """Whether a save is being written, as rank 0 sees it."""

    @property
    def longest_s(self) -> float:
        """The longest save so far, as rank 0 saw it."""

    def finish(self) -> None:
        """Waits for the save under way; raises on all ranks if it failed. Takes part: all ranks."""


class StopOnRequest(Callback):
    """SIGTERM, SIGINT or SIGUSR1 on any rank, or the time limit on rank 0's clock, makes all ranks save and end after
    the same step; a save that failed in the background ends the run on all ranks together.

    The flags are summed over ranks in the background and read a step later, when the gradient norm has brought the host
    up to date anyway.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self, saves: Saves, *, exit_after_minutes: float | None = None, started_s: float = 0.0) -> None:
        """
        Args:
            exit_after_minutes: Time limit of the process, its last save included; None for none.
            started_s: `time.monotonic()` when the limit began to run.
        """
        self._saves = saves
        self._limit_s = math.inf if exit_after_minutes is None else exit_after_minutes * 60
        self._started_s = started_s
        self._received = 0
        self._previous: Mapping[int, object] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._rank = 0
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
            text = f"{name} received: the run saves after this step and ends"
        else:
            text = f"{name} again: the run is about to save and ends after that; SIGKILL would lose its last steps"
        # Not by the logger: a signal may come while it holds its lock.
        os.write(sys.stderr.fileno(), f"{text}\n".encode())

    def on_step(self, trainer: "Trainer") -> None:
        if self._pending is not None:
            work, flags = self._pending
            work.wait()
            signalled, late, failed = flags.tolist()
            if failed:
                self._saves.finish()
            if (signalled or late) and not trainer.state.stop_requested:
                trainer.state.stop_requested = True
                reason = "by a signal" if signalled else "by training.exit_after_minutes"
                logger.info("the run is asked to end %s: it ends after step %d", reason, trainer.state.step)
        flags = torch.tensor(
            [float(self._received > 0), float(self._is_late()), float(self._saves.failed)],
            device=trainer.runtime.device,
        )
        self._pending = (dist.all_reduce(flags, async_op=True), flags)

    def _is_late(self) -> bool:
        """Whether rank 0 must end now to have saved within the limit: two more steps may pass, and the save."""
        now_s = time.monotonic()
        if self._last_step_s is not None:
            self._longest_step_s = max(self._longest_step_s, now_s - self._last_step_s)
        self._last_step_s = now_s
        # A disk may be half as fast the next time; how fast it is, is not known before the first save.
        save_s = 1.5 * self._saves.longest_s or 0.1 * self._limit_s
        if self._saves.in_progress:
            # The last one waits for it.
            save_s *= 2
        return self._rank == 0 and now_s - self._started_s + 2 * self._longest_step_s + save_s > self._limit_s

    def on_close(self, trainer: "Trainer") -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._pending is not None:
            self._pending[0].wait()
