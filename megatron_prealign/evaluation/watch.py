"""The alignment watch: word retrieval and cosines at every layer, again and again while a model is trained."""

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.evaluation.periodic import PeriodicMeasurement
from megatron_prealign.evaluation.retrieval import Retrieval, measure_retrieval
from megatron_prealign.evaluation.word_pairs import WordPairs
from megatron_prealign.recipe import AlignmentWatchSection
from megatron_prealign.training.progress_log import MetricsFile
from megatron_prealign.training.tensorboard import TensorBoard

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer

logger = logging.getLogger(__name__)


class AlignmentWatch(PeriodicMeasurement):
    """Measures before the first step of a run, every `section.interval` steps of it and at the end of each phase;
    writes metrics.jsonl and TensorBoard and tells the phase.

    The time this takes is no training time (`TrainState.seconds` grows in steps alone), and the training is the same
    with it and without it: nothing here draws random numbers or changes a weight.
    """

    def __init__(
        self,
        section: AlignmentWatchSection,
        pairs: Sequence[WordPairs],
        metrics: MetricsFile,
        tensorboard: TensorBoard,
    ) -> None:
        self._section = section
        self._pairs = pairs
        self._metrics = metrics
        self._tensorboard = tensorboard

    def on_start(self, trainer: "Trainer") -> None:
        counts = ", ".join(f"{pair.name} {len(pair.links)}" for pair in self._pairs)
        logger.info("alignment watch: pairs of %s words: %s", self._section.groups.replace("_", "-"), counts)
        # A resumed run has been here.
        if trainer.state.step == 0:
            self.measure(trainer)

    def is_due(self, state: TrainState) -> bool:
        return state.step % self._section.interval == 0

    def measure(self, trainer: "Trainer") -> None:
        state = trainer.state
        measured = measure_retrieval(
            trainer.runtime, trainer.chunks, self._pairs, num_layers=trainer.recipe.model.num_layers
        )
        trainer.phase.saw_alignment(state, measured)
        self._metrics.write(
            {
                "kind": "alignment_watch",
                "phase": trainer.phase.name,
                "step": state.step,
                "tokens": state.tokens,
                "seconds": round(state.seconds, 3),
                "groups": self._section.groups,
                "words": _words_asked(self._pairs),
                "pairs": _without_nan(measured),
            }
        )
        self._tensorboard.write(_scalars(measured), state.step)
        for pair in self._pairs:
            logger.info("alignment watch at step %d: %s", state.step, _line(measured, *pair.directions))


def _words_asked(pairs: Sequence[WordPairs]) -> dict[str, int]:
    """Words that were asked for, by direction."""
    return {
        direction: len(words)
        for pair in pairs
        for direction, words in zip(pair.directions, (pair.source, pair.target), strict=True)
    }


def _without_nan(measured: Retrieval) -> dict[str, dict[str, list[Any]]]:
    """The same with None for what is not a number, for which JSON has no word."""
    return {
        direction: {
            measure: [value if math.isfinite(value) else None for value in values]
            for measure, values in by_name.items()
        }
        for direction, by_name in measured.items()
    }


def _scalars(measured: Retrieval) -> dict[str, float]:
    """By TensorBoard tag: every layer, and the mean over the layers."""
    return {
        f"alignment_watch_{measure}/{direction}/{place}": value
        for direction, by_name in measured.items()
        for measure, values in by_name.items()
        for place, value in [*enumerate(values), ("mean", _mean(values))]
        if math.isfinite(value)
    }


def _line(measured: Retrieval, there: str, back: str) -> str:
    """Means over the layers of one language pair."""
    found = {name: _mean(values) for name, values in measured[there].items()}
    found_back = {name: _mean(values) for name, values in measured[back].items()}
    return (
        f"{there}, mean over layers: P@1 {found['p_at_1']:.2f} (back {found_back['p_at_1']:.2f}), "
        f"by CSLS {found['p_at_1_csls']:.2f} ({found_back['p_at_1_csls']:.2f}), "
        f"cosine {found['positive_cosine']:.2f} of translations, {found['negative_cosine']:.2f} of others"
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
