"""The alignment phase: word batches and language-model rows in one schedule pass."""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.recipe import ALIGNMENT, Recipe
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction
from megatron_prealign.runtime.optimizer import zero_frozen_gradients
from megatron_prealign.training.meter import Meter
from megatron_prealign.training.phase import AlignmentMeasures, Phase, ScheduleSettings
from megatron_prealign.training.rows import RowMicrobatch, RowReader, row_loss_sum
from megatron_prealign.training.word_steps import WordSteps

logger = logging.getLogger(__name__)


class AlignmentPhase(Phase):
    """Contrastive learning over dictionary words at every layer, plus next-token loss on rows of the blend."""

    name = ALIGNMENT

    def __init__(self, recipe: Recipe, runtime: Runtime, reader: RowReader, words: WordSteps) -> None:
        assert recipe.alignment is not None
        self._recipe = recipe
        self._section = recipe.alignment
        self._runtime = runtime
        self._reader = reader
        self._words = words
        self._meter = Meter({"lm_loss": 1}, runtime)

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
            moves_held=section.freeze == "none",
        )

    def forward_backward(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        rows: list[RowMicrobatch] = []
        if self._section.lm_global_batch_size:
            rows, _ = self._reader.read(state.consumed_samples, self._section.lm_global_batch_size, 0)
        self._words.run(state.step, chunks, rows, self._row_step, next_step=state.step + 1)
        if self._section.freeze != "none":
            zero_frozen_gradients(chunks)

    def _row_step(
        self, chunk: torch.nn.Module, rows: RowMicrobatch, microbatches: int
    ) -> tuple[torch.Tensor, LossFunction]:
        output, loss_of = row_loss_sum(chunk, rows)

        def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = loss_of(losses)
            self._meter.add("lm_loss", loss)
            # Megatron-Core averages over microbatches and data-parallel ranks; `loss` is already the step's mean.
            return loss * (self._section.lm_weight * microbatches * self._runtime.data_size), {}

        return output, loss_function

    def advance(self, state: TrainState) -> None:
        rows = self._section.lm_global_batch_size
        state.consumed_samples += rows
        state.tokens += rows * self._recipe.data.seq_length + self._words.tokens

    def metrics(self, steps: int) -> dict[str, Any]:
        words = self._words.metrics()
        lm_loss = self._meter.drain()["lm_loss"][0] / steps if self._section.lm_global_batch_size else None
        return {
            "loss": words["words_loss"] + self._section.lm_weight * (lm_loss or 0.0),
            "lm_loss": lm_loss,
            "alignment_loss": words["alignment_loss"],
        }

    def saw_evaluation(self, state: TrainState, evaluation: dict[str, Any]) -> None:
        goal = self._section.stop_at_p_at_1
        pairs = evaluation.get("word_retrieval_p_at_1", {})
        if goal is None or not pairs:
            return
        mean = self._words.mean_of_aligned(list(pairs.values()))
        if mean >= goal and not state.phase_done:
            state.phase_done = True
            logger.info(
                "the alignment phase ends at step %d: P@1 %.4f (mean over the aligned layers) has reached "
                "alignment.stop_at_p_at_1 %g",
                state.step,
                mean,
                goal,
            )

    def saw_alignment(self, state: TrainState, measured: AlignmentMeasures) -> None:
        # What is measured last here is what the guard of language-model training begins with.
        self._words.note_retrieval(state, measured)
