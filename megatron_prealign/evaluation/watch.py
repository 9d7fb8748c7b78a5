"""The alignment watch: periodic measurements of word retrieval and cosines at every layer during training."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.evaluation.erasure import ErasureWarning
from megatron_prealign.evaluation.periodic import PeriodicMeasurement
from megatron_prealign.evaluation.retrieval import Retrieval, measure_retrieval
from megatron_prealign.evaluation.retrieval_metrics import METRICS
from megatron_prealign.evaluation.word_pairs import WordPairs
from megatron_prealign.recipe import ALIGNMENT, AlignmentWatchSection
from megatron_prealign.training.metrics_log import MetricsLog
from megatron_prealign.training.position import position

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer

logger = logging.getLogger(__name__)


class AlignmentWatch(PeriodicMeasurement):
    """Measures before the first step of a run, every `section.interval` steps and at the end of each phase; logs
    metrics and notifies the phase.

    Each log line also has the values of the first measurement, before training: words with the same spelling in both
    languages are retrieved by an untrained model too. A resumed run reads them from metrics.jsonl.

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
        self._groups = section.groups.replace("_", "-")
        self._start: Retrieval | None = None
        self._erasure = ErasureWarning()

    def on_start(self, trainer: "Trainer") -> None:
        counts = ", ".join(f"{pair.name} {len(pair.links)}" for pair in self._pairs)
        logger.info("alignment watch: word retrieval of pairs of %s words: %s", self._groups, counts)
        # A resumed run has already measured its start.
        if trainer.state.step == 0:
            self.measure(trainer)
        else:
            self._read_recorded(trainer.state.step)

    def _read_recorded(self, last_step: int) -> None:
        """Reads the measurements of the same words before the first step and at the end of the alignment phase, as far
        as metrics.jsonl has them."""
        counts = _query_counts(self._pairs)
        try:
            for record in self._metrics.read("alignment_watch"):
                step = record.get("step")
                if (record.get("groups"), record.get("words")) != (self._section.groups, counts):
                    continue
                if not isinstance(step, int) or step > last_step:
                    # A step that the resumed run repeats.
                    continue
                measured = _with_nan(record.get("pairs"), counts)
                if measured is not None and step == 0:
                    self._start = measured
                elif measured is not None and record.get("phase") == ALIGNMENT:
                    self._erasure.remember(measured)
        except OSError as error:
            logger.warning("alignment watch: cannot read the values before training: %s", error)

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
        where = position(trainer)
        for pair in self._pairs:
            text = _summary(retrieval, self._start, *pair.directions)
            logger.info(
                "alignment watch at %s: %s words %s, mean over layers: %s", where, self._groups, pair.name, text
            )
        # Only from the source language: in the demo, the reverse at the output embedding is 0.05 with a guard too.
        forward = {pair.directions[0]: retrieval[pair.directions[0]] for pair in self._pairs}
        self._erasure.check(trainer.recipe, trainer.phase.name, where, forward)
        if state.step == 0:
            self._start = retrieval


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


def _with_nan(recorded: Any, directions: Iterable[str]) -> Retrieval | None:
    """Inverse of `_without_nan`, as far as the mean over the layers is concerned; None if a line that this version did
    not write, or that is damaged, has other values."""
    try:
        found = {
            direction: {
                metric: [math.nan if value is None else float(value) for value in recorded[direction][metric]]
                for metric in METRICS
            }
            for direction in directions
        }
    except (LookupError, TypeError, ValueError, OverflowError):
        return None
    lists = [values for by_metric in found.values() for values in by_metric.values()]
    return found if all(values and not any(map(math.isinf, values)) for values in lists) else None


def _summary(retrieval: Retrieval, start: Retrieval | None, direction: str, reverse: str) -> str:
    """Means over the layers for one language pair, each followed by its value at the start of the run."""

    def value(name: str, which: str = direction) -> str:
        text = f"{_mean(retrieval[which][name]):.2f}"
        return text if start is None else f"{text} (start {_mean(start[which][name]):.2f})"

    metrics = retrieval[direction]
    difference = f"{_cosine_difference(metrics):.2f}"
    if start is not None:
        difference += f" (start {_cosine_difference(start[direction]):.2f})"
    return (
        f"P@1 {value('p_at_1')}, reverse {value('p_at_1', reverse)}; "
        f"CSLS P@1 {value('p_at_1_csls')}, reverse {value('p_at_1_csls', reverse)}; "
        f"cosine of translations {_mean(metrics['positive_cosine']):.2f}, "
        f"of other pairs {_mean(metrics['negative_cosine']):.2f}, difference {difference}"
    )


def _cosine_difference(metrics: Mapping[str, Sequence[float]]) -> float:
    """How much more similar translations are than other pairs of words."""
    return _mean(metrics["positive_cosine"]) - _mean(metrics["negative_cosine"])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
