"""Evaluates a model: validation loss per language and class of word, word and sentence retrieval per layer."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.code_switch.switcher import SequenceFormat
from megatron_prealign.data.samples import ValidationSamples
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.evaluation.periodic import PeriodicMeasurement
from megatron_prealign.evaluation.retrieval import measure_retrieval
from megatron_prealign.evaluation.validation import validation_losses
from megatron_prealign.evaluation.word_classes import CLASS_TEXTS, WordClasses
from megatron_prealign.evaluation.word_pairs import SENTENCE_RETRIEVAL, WordPairs, evaluated_pairs, metric_names
from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.training.metrics_log import MetricsLog
from megatron_prealign.training.position import position

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer

logger = logging.getLogger(__name__)

# Metric of retrieval -> its name in the log.
_RETRIEVAL = {
    "word_retrieval_p_at_1": "word retrieval P@1 of trained words",
    "word_retrieval_p_at_1_held_out": "word retrieval P@1 of held-out words",
    SENTENCE_RETRIEVAL: "sentence retrieval P@1",
}


class Evaluator:
    """Evaluates a model as its recipe allows: loss on held-out text, word retrieval with a dictionary, sentence
    retrieval with parallel text."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        validation: ValidationSamples,
        sequence_format: SequenceFormat,
        words: tuple[DictionaryTable, NDArray[np.bool_]] | None,
        sentences: Sequence[WordPairs] = (),
        classes: WordClasses | None = None,
    ) -> None:
        """
        Args:
            sequence_format: The format used in training.
            words: The word table and the groups held out from training, bool `[groups]`, which are measured separately;
                None without a dictionary.
            sentences: Sentence pairs of the parallel text.
            classes: Classes of the labels of `validation`; None measures no loss by class of word.
        """
        self._recipe = recipe
        self._runtime = runtime
        self._validation = validation
        self._sequence_format = sequence_format
        self._pairs = evaluated_pairs(recipe, words, sentences)
        self._classes = classes or WordClasses()

    @property
    def names(self) -> list[str]:
        """Names of the metrics that `flatten_metrics` returns."""
        return metric_names(self._validation.languages, self._pairs, self._classes)

    def measure(self, chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
        """Measures `validation_loss` per language, `validation_loss_words` per language and class, and the retrieval
        metrics. Collective: call on all ranks."""
        for chunk in chunks:
            chunk.eval()
        losses = validation_losses(
            self._runtime,
            chunks,
            self._validation,
            micro_batch_size=self._recipe.training.micro_batch_size,
            sequence_format=self._sequence_format,
            classes=self._classes,
        )
        result: dict[str, Any] = {"validation_loss": losses.mean, "validation_loss_words": losses.by_class}
        for name, pairs in self._pairs.items():
            retrieval = measure_retrieval(self._runtime, chunks, pairs, num_layers=self._recipe.model.num_layers)
            result[name] = {pair.name: retrieval[pair.name]["p_at_1"] for pair in pairs}
        for chunk in chunks:
            chunk.train()
        return result


class Evaluate(PeriodicMeasurement):
    """Evaluates every `interval` steps and at the end of each phase; logs metrics and notifies the phase."""

    def __init__(self, evaluator: Evaluator, metrics: MetricsLog, interval: int | None) -> None:
        self._evaluator = evaluator
        self._metrics = metrics
        self._interval = interval

    def is_due(self, state: TrainState) -> bool:
        return self._interval is not None and state.phase_step % self._interval == 0

    def measure(self, trainer: "Trainer") -> None:
        state = trainer.state
        # Metrics of the ranks may differ by rounding, but a phase that ends at a goal must end on all ranks.
        results = [self._evaluator.measure(trainer.chunks)]
        dist.broadcast_object_list(results, src=0)
        result = results[0]
        trainer.eval_metrics, trainer.eval_step = flatten_metrics(result), state.step
        trainer.phase.on_evaluation(state, result)
        self._metrics.write(
            {
                "kind": "evaluation",
                "phase": trainer.phase.name,
                "step": state.step,
                "tokens": state.tokens,
                "seconds": round(state.seconds, 3),
                **result,
            }
        )
        losses = ", ".join(f"{language} {loss:.4f}" for language, loss in result["validation_loss"].items())
        logger.info("evaluation at %s: validation loss %s", position(trainer), losses or "none (no held-out text)")
        for language, by_class in result["validation_loss_words"].items():
            parts = ", ".join(f"{CLASS_TEXTS[name]} {loss:.4f}" for name, loss in by_class.items())
            logger.info("  loss of %s: %s", language, parts)
        for name, text in _RETRIEVAL.items():
            for pair, values in result[name].items():
                by_layer = " ".join(f"{value:.2f}" for value in values)
                logger.info("  %s, %s, by layer: %s", text, pair, by_layer)


def flatten_metrics(
    result: Mapping[str, Mapping[str, float | Sequence[float] | Mapping[str, float]]],
) -> dict[str, float]:
    """Flattens an evaluation to names such as `validation_loss/en` and `validation_loss_words/en/trained`; metrics per
    layer are averaged over the layers."""
    flat: dict[str, float] = {}
    for metric, by_name in result.items():
        for name, value in by_name.items():
            if isinstance(value, Mapping):
                flat.update({f"{metric}/{name}/{part}": each for part, each in value.items()})
            else:
                flat[f"{metric}/{name}"] = math.fsum(value) / len(value) if isinstance(value, Sequence) else value
    return flat
