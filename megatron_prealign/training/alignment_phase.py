"""Alignment phase: word batches and language-model samples in one schedule pass."""

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
from megatron_prealign.training.microbatches import SampleMicrobatch, SampleReader, StepSamples, lm_loss_sum
from megatron_prealign.training.phase import AlignmentMetrics, Phase, ScheduleSettings
from megatron_prealign.training.word_steps import WordSteps

logger = logging.getLogger(__name__)


class AlignmentPhase(Phase):
    """Contrastive learning over dictionary words at every layer, plus next-token loss on samples of the blend."""

    name = ALIGNMENT

    def __init__(self, recipe: Recipe, runtime: Runtime, reader: SampleReader, words: WordSteps) -> None:
        assert recipe.alignment is not None
        self._recipe = recipe
        self._section = recipe.alignment
        self._runtime = runtime
        self._reader = reader
        self._words = words
        self._meter = Meter({"lm_loss": 1}, runtime)

    def total_iters(self, state: TrainState) -> int:
        return self._section.train_iters

    def expected_step_tokens(self) -> float:
        return self._section.lm_global_batch_size * self._recipe.data.seq_length + self._words.sampler.mean_tokens

    def schedule_settings(self, state: TrainState) -> ScheduleSettings:
        section = self._section
        return ScheduleSettings(
            lr=section.lr,
            min_lr=section.min_lr,
            decay_style=section.lr_decay_style,
            warmup_iters=section.lr_warmup_iters,
            decay_iters=section.train_iters,
            updates_frozen=section.freeze == "none",
        )

    def forward_backward(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        last = state.phase_step + 1 >= self.total_iters(state)
        self._words.draw(state.step, chunks, following=None if last else state.step + 1)
        samples: list[SampleMicrobatch] = []
        if self._section.lm_global_batch_size:
            following = self.following(state)
            samples, _ = self._reader.read(
                self._samples_of(state), following=None if following is None else self._samples_of(following)
            )
        self._words.run(chunks, samples, self._lm_step)
        if self._section.freeze != "none":
            zero_frozen_gradients(chunks)

    def _samples_of(self, state: TrainState) -> StepSamples:
        return StepSamples(state.consumed_samples, self._section.lm_global_batch_size, consumed_tokens=0)

    def drain_waited_s(self) -> float:
        return self._words.drain_waited_s() + self._reader.drain_waited_s()

    def end(self) -> None:
        self._words.close()
        self._reader.close()

    def _lm_step(
        self, chunk: torch.nn.Module, samples: SampleMicrobatch, microbatches: int
    ) -> tuple[torch.Tensor, LossFunction]:
        output, loss_of = lm_loss_sum(chunk, samples)

        def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = loss_of(losses)
            self._meter.add("lm_loss", loss)
            # Megatron-Core averages over microbatches and data-parallel ranks; `loss` is already the step's mean.
            return loss * (self._section.lm_weight * microbatches * self._runtime.data_size), {}

        return output, loss_function

    def advance(self, state: TrainState) -> None:
        samples = self._section.lm_global_batch_size
        state.consumed_samples += samples
        state.tokens += samples * self._recipe.data.seq_length + self._words.tokens

    def metrics(self, steps: int) -> dict[str, Any]:
        words = self._words.metrics()
        lm_loss = self._meter.drain()["lm_loss"][0] / steps if self._section.lm_global_batch_size else None
        return {
            "loss": words["words_loss"] + self._section.lm_weight * (lm_loss or 0.0),
            "lm_loss": lm_loss,
            "alignment_loss": words["alignment_loss"],
        }

    def on_evaluation(self, state: TrainState, evaluation: dict[str, Any]) -> None:
        goal = self._section.stop_at_p_at_1
        pairs = evaluation.get("word_retrieval_p_at_1", {})
        if goal is None or not pairs:
            return
        mean = self._words.mean_of_aligned(list(pairs.values()))
        if mean >= goal and not state.phase_done:
            state.phase_done = True
            logger.info(
                "alignment phase ends at step %d: P@1 %.4f (mean over aligned layers) reached "
                "alignment.stop_at_p_at_1 %g",
                state.step,
                mean,
                goal,
            )

    def on_alignment_watch(self, state: TrainState, metrics: AlignmentMetrics) -> None:
        # The guard of language-model training starts with the last measurement of this phase.
        self._words.update_guard(state, metrics)
