"""Alignment steps: the words of a step and samples of the blend in one schedule pass.

Used by the alignment phase and by the alignment guard of language-model training.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from megatron_prealign.alignment.layout import WordLayout, collect_states
from megatron_prealign.alignment.packing import WordBatch
from megatron_prealign.alignment.projection import ProjectionHeads
from megatron_prealign.alignment.similarity_penalty import similarity_penalty
from megatron_prealign.alignment.taps import LayerTaps, Observer, no_loss
from megatron_prealign.alignment.words import StepWords, WordSampler
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.kernels import WordGroups, contrastive_loss
from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, gather_parameters, run_schedule, schedule_length, unwrap
from megatron_prealign.runtime.read_ahead import ReadAhead
from megatron_prealign.training.meter import Meter
from megatron_prealign.training.microbatches import SampleMicrobatch, idle_microbatch
from megatron_prealign.training.phase import AlignmentMetrics

logger = logging.getLogger(__name__)

# (chunk, samples, number of microbatches in the schedule) -> the chunk's output and its loss function.
LMStep = Callable[[torch.nn.Module, SampleMicrobatch, int], tuple[torch.Tensor, LossFunction]]


class WordSteps:
    """Draws the words of a step, attaches the loss of every aligned layer and runs the schedule."""

    def __init__(self, recipe: Recipe, runtime: Runtime, sampler: WordSampler) -> None:
        assert recipe.alignment is not None
        self._recipe = recipe
        self._section = recipe.alignment
        self._runtime = runtime
        self.sampler = sampler
        self.layer_weights = recipe.alignment.layer_weights(recipe.model.num_layers)
        own = recipe.alignment.words_per_step // runtime.data_size
        self._word_microbatches = own // (recipe.alignment.word_micro_batch_size or own)
        self._dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
        self._meter = Meter({"alignment_loss": len(self.layer_weights), "similarity_penalty": 1}, runtime)
        # Includes the output embedding even without weight: overlapped gradient reduction waits for every parameter,
        # and without samples of the blend nothing else uses this one.
        last = len(self.layer_weights) - 1
        self._observed = {layer for layer, weight in enumerate(self.layer_weights) if weight} | {last}
        self._heads: ProjectionHeads | None = None
        self._ahead = ReadAhead("words", self._draw, runtime.device)
        self._steps = 0
        self._skipped = 0
        self.tokens = 0
        """Number of word tokens of the last step, over all ranks."""

    def attach(self, chunks: Sequence[torch.nn.Module]) -> ProjectionHeads | None:
        """Creates the projection heads of this stage if the recipe has them; call once, before the first step."""
        section, recipe = self._section, self._recipe
        if section.projection_size is not None:
            self._heads = ProjectionHeads(
                [unwrap(chunk) for chunk in chunks],
                self._runtime,
                layer_weights=self.layer_weights,
                size=section.projection_size,
                lr=section.lr,
                clip_grad=recipe.optimizer.clip_grad,
                seed=recipe.training.seed,
            )
        return self._heads

    def draw(self, step: int, chunks: Sequence[torch.nn.Module], *, following: int | None) -> None:
        """Draws the words of `step`, for `run`.

        Args:
            following: Expected next step with words, which is drawn while the device works on this one; None if there
                is none.
        """
        self._layout = WordLayout.of(self._runtime, chunks)
        self._drawn = self._ahead.take(
            (step, self._layout), following=None if following is None else (following, self._layout)
        )
        self.tokens = self._drawn.tokens if self._drawn.pairs else 0
        if not self._drawn.pairs:
            self._skip(step)

    def _draw(self, step_and_layout: tuple[int, WordLayout]) -> StepWords:
        step, layout = step_and_layout
        return self.sampler.draw(step, layout, microbatches=self._word_microbatches)

    def drain_waited_s(self) -> float:
        """Returns the seconds that this process has waited for words since the last call."""
        return self._ahead.drain_waited_s()

    def close(self) -> None:
        """Drops the words that were drawn ahead."""
        self._ahead.close()

    def run(self, chunks: Sequence[torch.nn.Module], samples: Sequence[SampleMicrobatch], lm_step: LMStep) -> None:
        """Accumulates the gradients of the words of the last `draw` and of the samples in the chunks' gradient buffers.

        Collective: call on all ranks.
        """
        words, batches = self._drawn, self._drawn.batches
        if not words.pairs:
            # At least one microbatch is needed to finalise gradients, even if they are zeros.
            batches, samples = [], samples or [idle_microbatch(self._runtime)]
        self._steps += bool(batches)
        microbatches = schedule_length(self._runtime, len(batches) + len(samples))
        taps = LayerTaps([unwrap(chunk) for chunk in chunks], self._runtime, self._recipe.model.num_layers)
        # The taps read the output embedding before any forward pass that would gather its updated shards.
        gather_parameters([chunk for chunk in chunks if unwrap(chunk).post_process])
        if len(batches) > 1:
            observer = self._from_gradients(self._state_gradients(chunks, words), batches)
        else:
            observer = self._from_states(words.groups)

        def forward_step(
            iterator: Iterator[WordBatch | SampleMicrobatch], chunk: torch.nn.Module
        ) -> tuple[torch.Tensor, LossFunction]:
            batch = next(iterator)
            if isinstance(batch, SampleMicrobatch):
                return lm_step(chunk, batch, microbatches)
            return _word_step(taps, chunk, batch, microbatches)

        with taps.observing(observer, layers=self._observed, needs_graph=True):
            run_schedule(
                self._runtime,
                chunks,
                forward_step,
                [*batches, *samples],
                idle=lambda: idle_microbatch(self._runtime),
                shape=(self._recipe.data.seq_length, self._recipe.training.micro_batch_size),
                mixed_shapes=True,
            )
        if self._heads is not None:
            self._heads.step()

    def _skip(self, step: int) -> None:
        self._skipped += 1
        logger.warning(
            "step %d: no word in the batch has a translation in the batch; skipped its words (%d such steps so far)",
            step,
            self._skipped,
        )

    def _layer_loss(self, layer: int, states: torch.Tensor, groups: WordGroups) -> torch.Tensor:
        """Returns the weighted loss to attach to one layer, scaled so that Megatron-Core's averaging over data-parallel
        ranks yields its sum."""
        section, weight, group = self._section, self.layer_weights[layer], self._runtime.groups.tp_dp_cp
        if not weight:
            return (states * 0.0).sum()
        projected = states if self._heads is None else self._heads(layer, states)
        projected = projected.to(self._dtype)
        loss = contrastive_loss(projected, groups, temperature=section.temperature, process_group=group)
        self._meter.add("alignment_loss", loss, index=layer, split_over_tensor_ranks=True)
        loss = section.alpha * loss
        if section.gamma:
            penalty = similarity_penalty(projected, groups, group)
            # Every rank computes the full penalty, and the meter sums over ranks.
            contribution = penalty * (weight / group.size())
            self._meter.add("similarity_penalty", contribution, split_over_tensor_ranks=True)
            loss = loss + section.gamma * penalty
        return loss * (weight * self._runtime.data_size)

    def _from_states(self, groups: WordGroups) -> Observer:
        """Observer that attaches the losses themselves; for steps with all words in one microbatch."""

        def observe(layer: int, states: torch.Tensor, batch: WordBatch) -> torch.Tensor | None:
            return self._layer_loss(layer, states, groups)

        return observe

    def _from_gradients(self, gradients: dict[int, list[torch.Tensor]], batches: list[WordBatch]) -> Observer:
        """Observer that attaches products of states and `gradients`, which were computed over all microbatches; their
        gradients equal those of the losses."""
        index_of = {id(batch): index for index, batch in enumerate(batches)}

        def observe(layer: int, states: torch.Tensor, batch: WordBatch) -> torch.Tensor | None:
            return (states * gradients[layer][index_of[id(batch)]]).sum()

        return observe

    def _state_gradients(self, chunks: Sequence[torch.nn.Module], words: StepWords) -> dict[int, list[torch.Tensor]]:
        """Returns the gradients of this stage's losses with respect to the word states, by layer and microbatch.

        A forward pass over all word microbatches collects the states, then each layer's loss is computed once.
        """
        states = collect_states(
            self._runtime,
            chunks,
            self._layout,
            words.batches,
            num_layers=self._recipe.model.num_layers,
            layers=self._observed,
        )
        gradients = {}
        for layer in sorted(states):
            leaf = states.pop(layer).requires_grad_()
            self._layer_loss(layer, leaf, words.groups).backward()
            assert leaf.grad is not None
            gradients[layer] = list(leaf.grad.chunk(len(words.batches)))
        return gradients

    def metrics(self) -> dict[str, Any]:
        """Returns means over the steps with words since the last call; None for layers without weight. Collective: call
        on all ranks."""
        sums = self._meter.drain()
        steps = max(self._steps, 1)
        by_layer = [
            loss / steps if weight else None
            for weight, loss in zip(self.layer_weights, sums["alignment_loss"], strict=True)
        ]
        aligned = sum(
            weight * loss for weight, loss in zip(self.layer_weights, by_layer, strict=True) if loss is not None
        )
        penalty = sums["similarity_penalty"][0] / steps
        metrics = {
            "words_loss": self._section.alpha * aligned + self._section.gamma * penalty,
            "alignment_loss": by_layer,
            "word_steps": self._steps,
        }
        self._steps = 0
        return metrics

    def update_guard(self, state: TrainState, metrics: AlignmentMetrics) -> None:
        """Records in `state` whether retrieval is below the floor of the alignment guard, if it has one."""
        guard = self._recipe.alignment_guard
        if guard is not None and guard.floor is not None:
            retrieval = self.mean_of_aligned([by_name["p_at_1"] for by_name in metrics.values()])
            below = retrieval < guard.floor
            if below != state.below_floor:
                logger.info(
                    "alignment guard %s: P@1 %.4f (mean over aligned layers), floor %g",
                    "on" if below else "off",
                    retrieval,
                    guard.floor,
                )
            state.below_floor = below

    def mean_of_aligned(self, by_pair: Sequence[Sequence[float]]) -> float:
        """Mean of a metric over the aligned layers and the language pairs.

        Args:
            by_pair: One value per layer, for each language pair.
        """
        values = [
            value for by_layer in by_pair for value, weight in zip(by_layer, self.layer_weights, strict=True) if weight
        ]
        return math.fsum(values) / len(values)


def _word_step(
    taps: LayerTaps, chunk: torch.nn.Module, batch: WordBatch, microbatches: int
) -> tuple[torch.Tensor, LossFunction]:
    output = taps.run_words(chunk, unwrap(chunk), batch)
    output_embedding_loss = taps.output_embedding_loss

    def loss_function(hidden: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        loss = no_loss(hidden)
        if output_embedding_loss is not None:
            # Unlike attached losses, this one is divided by the number of microbatches in Megatron-Core.
            loss = loss + output_embedding_loss * microbatches
        return loss, {}

    return output, loss_function
