"""The alignment watch: periodic measurements of word retrieval and cosines at every layer during training."""

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.evaluation.periodic import PeriodicMeasurement
from megatron_prealign.evaluation.retrieval import Retrieval, measure_retrieval
from megatron_prealign.evaluation.word_pairs import WordPairs
from megatron_prealign.recipe import AlignmentWatchSection
from megatron_prealign.training.metrics_log import MetricsLog

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer

logger = logging.getLogger(__name__)


class AlignmentWatch(PeriodicMeasurement):
    """Measures before the first step of a run, every `section.interval` steps and at the end of each phase; logs
    metrics and notifies the phase.

    The time for measurements does not count as training time (`TrainState.seconds` only grows in steps). Measurements
    do not affect training: they draw no random numbers and change no weights.
    """

    def __init__(
        self,
        section: AlignmentWatchSection,
        pairs: Sequence[WordPairs],
        metrics: MetricsLog,
    ) -> None:
        self._section = section
        self._pairs = pairs
        self._metrics = metrics

    def on_start(self, trainer: "Trainer") -> None:
        counts = ", ".join(f"{pair.name} {len(pair.links)}" for pair in self._pairs)
        logger.info("alignment watch: pairs of %s words: %s", self._section.groups.replace("_", "-"), counts)
        # A resumed run has already measured its start.
        if trainer.state.step == 0:
            self.measure(trainer)

    def is_due(self, state: TrainState) -> bool:
        return state.step % self._section.interval == 0

    def measure(self, trainer: "Trainer") -> None:
        state = trainer.state
        retrieval = measure_retrieval(
            trainer.runtime, trainer.chunks, self._pairs, num_layers=trainer.recipe.model.num_layers
        )
        trainer.phase.on_alignment_watch(state, retrieval)
        self._metrics.write(
            {
                "kind": "alignment_watch",
                "phase": trainer.phase.name,
                "step": state.step,
                "tokens": state.tokens,
                "seconds": round(state.seconds, 3),
                "groups": self._section.groups,
                "words": _query_counts(self._pairs),
                "pairs": _without_nan(retrieval),
            }
        )
        for pair in self._pairs:
            logger.info("alignment watch at step %d: %s", state.step, _summary(retrieval, *pair.directions))


def _query_counts(pairs: Sequence[WordPairs]) -> dict[str, int]:
    """Number of query words per direction."""
    return {
        direction: len(words)
        for pair in pairs
        for direction, words in zip(pair.directions, (pair.source, pair.target), strict=True)
    }


def _without_nan(retrieval: Retrieval) -> dict[str, dict[str, list[Any]]]:
    """Replaces NaN and Inf by None, because JSON cannot represent them."""
    return {
        direction: {
            metric: [value if math.isfinite(value) else None for value in values] for metric, values in by_name.items()
        }
        for direction, by_name in retrieval.items()
    }


def _summary(retrieval: Retrieval, direction: str, reverse: str) -> str:
    """Means over the layers for one language pair."""
    means = {name: _mean(values) for name, values in retrieval[direction].items()}
    reverse_means = {name: _mean(values) for name, values in retrieval[reverse].items()}
    return (
        f"{direction}, mean over layers: P@1 {means['p_at_1']:.2f} (reverse {reverse_means['p_at_1']:.2f}), "
        f"CSLS P@1 {means['p_at_1_csls']:.2f} (reverse {reverse_means['p_at_1_csls']:.2f}), "
        f"cosine {means['positive_cosine']:.2f} (translations), {means['negative_cosine']:.2f} (other pairs)"
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
