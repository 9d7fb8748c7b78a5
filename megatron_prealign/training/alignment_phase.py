"""The alignment phase: word batches and language-model rows in one schedule pass."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from megatron_prealign.alignment.objective import contrastive_loss
from megatron_prealign.alignment.taps import LayerTaps, no_loss
from megatron_prealign.alignment.words import WordBatch, WordSampler
from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, gather_parameters, run_schedule, schedule_length, unwrap
from megatron_prealign.training.meter import Meter
from megatron_prealign.training.phase import Phase, ScheduleSettings
from megatron_prealign.training.rows import RowMicrobatch, RowReader, idle_rows, row_loss_sum
from megatron_prealign.training.state import TrainState


class AlignmentPhase(Phase):
    """Contrastive learning over dictionary words at every layer, plus next-token loss on rows of the blend."""

    name = "alignment"

    def __init__(self, recipe: Recipe, runtime: Runtime, reader: RowReader, sampler: WordSampler) -> None:
        assert recipe.alignment is not None
        self._recipe = recipe
        self._section = recipe.alignment
        self._runtime = runtime
        self._reader = reader
        self._sampler = sampler
        self._num_tapped = recipe.model.num_layers + 2
        layers = self._section.layers or list(range(self._num_tapped))
        self._layer_weight = [1.0 / len(layers) if layer in layers else 0.0 for layer in range(self._num_tapped)]
        self._meter = Meter({"lm_loss": 1, "alignment_loss": self._num_tapped, "similarity_penalty": 1}, runtime)
        self._microbatches = 0
        self._word_tokens = 0
        self._open = ExitStack()

    def total_iters(self, state: TrainState) -> int:
        return self._section.train_iters

    def schedule_settings(self, state: TrainState) -> ScheduleSettings:
        section = self._section
        return ScheduleSettings(
            lr=section.lr,
            min_lr=section.min_lr,
            decay_style=section.lr_decay_style,
            warmup_iters=section.lr_warmup_iters,
            decay_iters=section.train_iters,
        )

    def begin(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        self._taps = LayerTaps([unwrap(chunk) for chunk in chunks], self._runtime, self._recipe.model.num_layers)
        self._open.enter_context(self._taps.observing(self._layer_loss))

    def end(self) -> None:
        self._open.close()

    def forward_backward(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        words = self._draw_words(state)
        rows: list[RowMicrobatch] = []
        if self._section.lm_global_batch_size:
            rows, _ = self._reader.read(state.consumed_samples, self._section.lm_global_batch_size, 0)
        self._word_tokens = words.global_tokens
        self._microbatches = schedule_length(self._runtime, 1 + len(rows))
        self._taps.begin_step()
        # The taps read the output embedding before any forward pass of it could fetch its update.
        gather_parameters(chunks)
        run_schedule(
            self._runtime,
            chunks,
            self._forward_step,
            [words, *rows],
            idle=lambda: idle_rows(self._runtime),
            shape=(self._recipe.data.seq_length, self._recipe.training.micro_batch_size),
            mixed_shapes=True,
        )

    def _draw_words(self, state: TrainState) -> WordBatch:
        parallel = self._recipe.parallel
        return self._sampler.draw(
            state.phase_step,
            rank=self._runtime.data_rank,
            ranks=self._runtime.data_size,
            multiple=parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1,
            device=self._runtime.device,
        )

    def _layer_loss(self, layer: int, words: torch.Tensor, batch: WordBatch) -> torch.Tensor | None:
        """The loss to attach to one layer, scaled so that Megatron-Core's averaging over data-parallel ranks leaves
        its sum."""
        # With full recomputation the first forward pass keeps no graph; the loss belongs to the second one.
        if not torch.is_grad_enabled():
            return None
        weight = self._layer_weight[layer]
        is_output_embedding = layer == self._num_tapped - 1
        if weight == 0.0 and not is_output_embedding:
            return None
        section = self._section
        loss, penalty = contrastive_loss(
            words,
            batch.groups,
            temperature=section.temperature,
            group=self._runtime.groups.dp,
            with_penalty=section.gamma > 0,
        )
        if weight:
            self._meter.add("alignment_loss", loss, index=layer)
        loss = section.alpha * loss
        if penalty is not None:
            self._meter.add("similarity_penalty", penalty * weight)
            loss = loss + section.gamma * penalty
        # An unweighted output embedding still joins the graph with weight 0: overlapped gradient reduction waits for
        # every parameter, and without rows of the blend nothing else touches this one.
        return loss * (weight * self._runtime.data_size)

    def _forward_step(
        self, microbatches: Iterator[WordBatch | RowMicrobatch], chunk: torch.nn.Module
    ) -> tuple[torch.Tensor, LossFunction]:
        batch = next(microbatches)
        if isinstance(batch, WordBatch):
            return self._word_step(chunk, batch)
        output, loss_of = row_loss_sum(chunk, batch)

        def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = loss_of(losses)
            self._meter.add("lm_loss", loss)
            return loss * (self._section.lm_weight * self._microbatches * self._runtime.data_size), {}

        return output, loss_function

    def _word_step(self, chunk: torch.nn.Module, batch: WordBatch) -> tuple[torch.Tensor, LossFunction]:
        output = self._taps.run_words(chunk, unwrap(chunk), batch)
        output_embedding_loss = self._taps.output_embedding_loss

        def loss_function(hidden: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = no_loss(hidden)
            if output_embedding_loss is not None:
                # Attached losses pass by Megatron-Core's division by the number of microbatches, this one does not.
                loss = loss + output_embedding_loss * self._microbatches
            return loss, {}

        return output, loss_function

    def advance(self, state: TrainState) -> None:
        rows = self._section.lm_global_batch_size
        state.consumed_samples += rows
        state.tokens += rows * self._recipe.data.seq_length + self._word_tokens

    def metrics(self, steps: int) -> dict[str, Any]:
        sums = self._meter.drain()
        by_layer = [value / steps for value in sums["alignment_loss"]]
        lm_loss = sums["lm_loss"][0] / steps if self._section.lm_global_batch_size else None
        alignment = sum(weight * loss for weight, loss in zip(self._layer_weight, by_layer, strict=True))
        penalty = sums["similarity_penalty"][0] / steps
        section = self._section
        return {
            "loss": section.alpha * alignment + section.gamma * penalty + section.lm_weight * (lm_loss or 0.0),
            "lm_loss": lm_loss,
            "alignment_loss": [
                loss if weight else None for weight, loss in zip(self._layer_weight, by_layer, strict=True)
            ],
        }

    def saw_evaluation(self, state: TrainState, evaluation: dict[str, Any]) -> None:
        goal = self._section.stop_at_p_at_1
        pairs = evaluation.get("word_retrieval_p_at_1", {})
        if goal is None or not pairs:
            return
        aligned = [layer for layer, weight in enumerate(self._layer_weight) if weight]
        values = [by_layer[layer] for by_layer in pairs.values() for layer in aligned]
        state.phase_done = state.phase_done or math.fsum(values) / len(values) >= goal
