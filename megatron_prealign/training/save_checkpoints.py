"""Callback that saves checkpoints."""

from typing import TYPE_CHECKING

from megatron_prealign.checkpoint.store import CheckpointStore
from megatron_prealign.data.samples import TrainSamples
from megatron_prealign.runtime.engine import gather_parameters
from megatron_prealign.training.callbacks import Callback
from megatron_prealign.training.metrics_log import MetricsLog

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer


class SaveCheckpoints(Callback):
    """Saves every `interval` steps, at the end of each phase and when a stop is requested; waits for a background save
    before the run ends, also after an error."""

    def __init__(
        self, store: CheckpointStore, samples: TrainSamples, metrics: MetricsLog, interval: int | None
    ) -> None:
        self._store = store
        self._samples = samples
        self._metrics = metrics
        self._interval = interval
        self._saved_step = -1

    def on_step(self, trainer: "Trainer") -> None:
        due = self._interval is not None and trainer.state.step % self._interval == 0
        # `on_phase_end` saves a phase's last step after the evaluation, so that a run killed in between repeats it.
        if (due or trainer.state.stop_requested) and not trainer.phase.is_over(trainer.state):
            self._save(trainer)
        self._report()

    def on_phase_end(self, trainer: "Trainer") -> None:
        self._save(trainer)

    def on_end(self, trainer: "Trainer") -> None:
        self._store.finish()
        self._report()

    def on_close(self, trainer: "Trainer") -> None:
        self._store.finish_after_error()
        self._report()

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
            blend=self._samples.blend_state(state.consumed_samples),
            metrics=trainer.eval_metrics if trainer.eval_step == state.step else {},
            phase_over=trainer.phase.is_over(state),
        )
        self._saved_step = state.step

    def _report(self) -> None:
        """Writes metrics of the saves completed since the last call; not done in the background, where two lines of the
        file could interleave."""
        while self._store.reports:
            report = self._store.reports.pop(0)
            self._metrics.write(
                {
                    "kind": "checkpoint",
                    "phase": report.phase,
                    "step": report.step,
                    "paused_s": round(report.paused_s, 3),
                    "waited_s": round(report.waited_s, 3),
                    "seconds": round(report.seconds, 3),
                    "bytes": report.bytes,
                    "bytes_per_second": round(report.bytes_per_second),
                }
            )
