"""Measuring again and again while a model is trained."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.training.callbacks import Callback

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer


class PeriodicMeasurement(Callback, ABC):
    """Measures at the steps that are due and at the end of each phase."""

    _measured_step = -1

    @abstractmethod
    def is_due(self, state: TrainState) -> bool:
        """Whether to measure after the step that has just been done."""

    @abstractmethod
    def measure(self, trainer: "Trainer") -> None:
        """Measures, writes the result and tells the phase. Takes part: all ranks."""

    def on_step(self, trainer: "Trainer") -> None:
        state = trainer.state
        # A run that was asked to stop has little time left, and saving comes first; a phase's end measures by itself.
        if state.stop_requested or trainer.phase.is_over(state):
            return
        if self.is_due(state):
            self._measured_step = state.step
            self.measure(trainer)

    def on_phase_end(self, trainer: "Trainer") -> None:
        # A phase that has reached its goal was measured by `on_step` a moment ago.
        if trainer.state.step != self._measured_step:
            self._measured_step = trainer.state.step
            self.measure(trainer)
