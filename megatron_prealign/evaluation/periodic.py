"""Periodic measurements during training."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.training.callbacks import Callback

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer


class PeriodicMeasurement(Callback, ABC):
    """Measures at the steps where `is_due` is true and at the end of each phase."""

    _measured_step = -1

    @abstractmethod
    def is_due(self, state: TrainState) -> bool:
        """Whether to measure after the step that has just finished."""

    @abstractmethod
    def measure(self, trainer: "Trainer") -> None:
        """Measures, writes the result and notifies the phase. Collective: call on all ranks."""

    def on_step(self, trainer: "Trainer") -> None:
        state = trainer.state
        # A run that is asked to stop must save quickly; the end of a phase is measured in `on_phase_end`.
        if state.stop_requested or trainer.phase.is_over(state):
            return
        if self.is_due(state):
            self._measured_step = state.step
            self.measure(trainer)

    def on_phase_end(self, trainer: "Trainer") -> None:
        # If the phase ended because it reached its goal, `on_step` has already measured this step.
        if trainer.state.step != self._measured_step:
            self._measured_step = trainer.state.step
            self.measure(trainer)
