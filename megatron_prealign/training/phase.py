"""Base class of training phases: batches, forward step, metrics and stopping rule."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_prealign.checkpoint.train_state import TrainState

# Direction such as "en-de" -> metric such as "p_at_1" -> one value per layer.
AlignmentMetrics = Mapping[str, Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class ScheduleSettings:
    """Learning-rate schedule of a phase, in optimizer steps."""

    lr: float
    min_lr: float
    decay_style: str
    warmup_iters: int
    decay_iters: int
    updates_frozen: bool = True
    """Whether parameters marked by `runtime.optimizer.freeze` are updated in this phase."""


class Phase(ABC):
    """A phase of a run. The trainer calls `begin` once, then `forward_backward` and `advance` for each step, then
    `end`."""

    name: str
    fresh_optimizer: bool = True
    """Whether the phase resets the optimizer state or keeps that of the previous phase."""

    @abstractmethod
    def total_iters(self, state: TrainState) -> int:
        """Returns the number of optimizer steps of the phase; `state` has the counters of earlier phases."""

    @abstractmethod
    def schedule_settings(self, state: TrainState) -> ScheduleSettings:
        """Returns the phase's learning-rate schedule."""

    @abstractmethod
    def forward_backward(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        """Accumulates the gradients of one step in the chunks' gradient buffers."""

    @abstractmethod
    def advance(self, state: TrainState) -> None:
        """Adds the samples and tokens of the step to the counters in `state`."""

    def expected_step_tokens(self) -> float:
        """Tokens of a step before the first one, of a phase that others follow."""
        return 0.0

    def finish_step(self, state: TrainState) -> None:
        """Advances all counters in `state` by one step."""
        self.advance(state)
        state.phase_step += 1
        state.step += 1

    def following(self, state: TrainState) -> TrainState | None:
        """Counters after the step that starts at `state`, to read its successor ahead; None if there is none in this
        phase, as far as is known before the step."""
        later = replace(state)
        self.finish_step(later)
        return None if self.is_over(later) else later

    @abstractmethod
    def metrics(self, steps: int) -> dict[str, Any]:
        """Returns the metrics of the last `steps` steps for a log line. Collective: call on all ranks."""

    def drain_waited_s(self) -> float:
        """Returns the seconds that this process has waited for data since the last call."""
        return 0.0

    def begin(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        """Called before the first step of the phase in this process."""

    def end(self) -> None:
        """Called when the phase or the run ends."""

    def on_evaluation(self, state: TrainState, evaluation: dict[str, Any]) -> None:
        """Called with the result of each evaluation; a phase may set `state.phase_done`."""

    def on_alignment_watch(self, state: TrainState, metrics: AlignmentMetrics) -> None:
        """Called with each measurement of the alignment watch, identical on every rank; a phase may set
        `state.phase_done`. The measurement before the first step of a fresh run precedes `begin`."""

    def is_over(self, state: TrainState) -> bool:
        return state.phase_done or state.phase_step >= self.total_iters(state)
