"""What a phase of training is: its batches, its forward step, its metrics and its stop rule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_prealign.checkpoint.train_state import TrainState

# Direction such as "en-de" -> measure such as "p_at_1" -> one value a layer.
AlignmentMeasures = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning-rate schedule of a phase, in optimizer steps."""

    lr: float
    min_lr: float
    decay_style: str
    warmup_iters: int
    decay_iters: int
    moves_held: bool = True
    """Whether parameters that were marked by `runtime.optimizer.hold` move in this phase."""


class Phase(ABC):
    """One phase of a run. The trainer calls `begin` once, then `forward_backward` and `advance` step by step, then
    `end`."""

    name: str
    fresh_optimizer: bool = True
    """Whether the phase starts with a fresh optimizer or goes on with the one of the phase before it."""

    @abstractmethod
    def total_iters(self, state: TrainState) -> int:
        """Optimizer steps of the whole phase; `state` tells what earlier phases consumed."""

    @abstractmethod
    def schedule_settings(self, state: TrainState) -> ScheduleSettings:
        """The phase's learning-rate schedule."""

    @abstractmethod
    def forward_backward(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        """Leaves the gradients of one step in the chunks' gradient buffers."""

    @abstractmethod
    def advance(self, state: TrainState) -> None:
        """Counts what the step consumed."""

    @abstractmethod
    def metrics(self, steps: int) -> dict[str, Any]:
        """Metrics of the last `steps` steps, ready for a log line. Takes part: all ranks."""

    def begin(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        """Called before the first step of the phase in this process."""

    def end(self) -> None:
        """Called when the phase is over or the run ends."""

    def saw_evaluation(self, state: TrainState, evaluation: dict[str, Any]) -> None:
        """Called with the result of each evaluation; a phase may set `state.phase_done`."""

    def saw_alignment(self, state: TrainState, measured: AlignmentMeasures) -> None:
        """Called with what each measurement of the alignment watch found, the same on every rank; a phase may set
        `state.phase_done`. Before the first step of a fresh run it comes ahead of `begin`."""

    def is_over(self, state: TrainState) -> bool:
        return state.phase_done or state.phase_step >= self.total_iters(state)
