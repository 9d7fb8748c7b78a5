"""The callback that saves checkpoints."""

from typing import TYPE_CHECKING

from megatron_prealign.data.samples import TrainSamples
from megatron_prealign.runtime.engine import gather_parameters
from megatron_prealign.training.callbacks import Callback
from megatron_prealign.training.checkpoint import CheckpointStore

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer


class SaveCheckpoints(Callback):
    """Saves every `interval` steps, at the end of each phase and when a signal ends the run."""

    def __init__(self, store: CheckpointStore, samples: TrainSamples, interval: int | None) -> None:
        self._store = store
        self._samples = samples
        self._interval = interval
        self._saved_step = -1

    def on_step(self, trainer: "Trainer") -> None:
        due = self._interval is not None and trainer.state.step % self._interval == 0
        # A phase's last step is saved by `on_phase_end`, after the evaluation there: a run killed in between repeats
        # it.
        if (due or trainer.state.stop_requested) and not trainer.phase.is_over(trainer.state):
            self._save(trainer)

    def on_phase_end(self, trainer: "Trainer") -> None:
        self._save(trainer)

    def _save(self, trainer: "Trainer") -> None:
        state = trainer.state
        if state.step == self._saved_step:
            return
        gather_parameters(trainer.chunks)
        self._store.save(
            trainer.chunks,
            trainer.optimizer,
            state,
            phase=trainer.phase.name,
            consumed=self._samples.consumed_per_source(state.consumed_samples),
        )
        self._saved_step = state.step
