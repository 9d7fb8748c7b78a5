"""Everything periodic: a callback sees the run begin, each step, each end of a phase and the end of the run."""

import gc
import signal
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer


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


class StopOnSignal(Callback):
    """SIGTERM or SIGINT on any rank makes all ranks save and end after the same step.

    The flag is summed over ranks in the background and read a step later, when the gradient norm has brought the host
    up to date anyway.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._received = False
        self._previous: Mapping[int, object] = {}
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def on_start(self, trainer: "Trainer") -> None:
        self._previous = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def on_step(self, trainer: "Trainer") -> None:
        if self._pending is not None:
            work, flag = self._pending
            work.wait()
            if float(flag) > 0:
                trainer.state.stop_requested = True
        flag = torch.full((), float(self._received), device=trainer.runtime.device)
        self._pending = (dist.all_reduce(flag, async_op=True), flag)

    def on_close(self, trainer: "Trainer") -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._pending is not None:
            self._pending[0].wait()
