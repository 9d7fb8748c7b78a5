"""Language-model training on the blend, with code-switching if the recipe enables it."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError
from megatron_prealign.kernels import LANGUAGES_FROM
from megatron_prealign.recipe import LANGUAGE_MODEL, Recipe
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import LossFunction, run_schedule, schedule_length
from megatron_prealign.training.meter import Meter
from megatron_prealign.training.microbatches import (
    SampleMicrobatch,
    SampleReader,
    StepSamples,
    idle_microbatch,
    lm_loss_sum,
)
from megatron_prealign.training.phase import Phase, ScheduleSettings


class LanguageModelPhase(Phase):
    """Next-token prediction."""

    name = LANGUAGE_MODEL

    def __init__(
        self, recipe: Recipe, runtime: Runtime, reader: SampleReader, *, target_languages: Sequence[str] | None
    ) -> None:
        """
        Args:
            target_languages: Target languages of code-switching, in the order of its counts; None without it.
        """
        self._recipe = recipe
        self._runtime = runtime
        self._reader = reader
        self._target_languages = target_languages
        self.fresh_optimizer = recipe.alignment is None or not recipe.alignment.keep_optimizer
        sizes = {"loss": 1}
        if target_languages is not None:
            sizes["counts"] = LANGUAGES_FROM + len(target_languages)
        self._meter = Meter(sizes, runtime)
        self._counted_steps = 0

    def total_iters(self, state: TrainState) -> int:
        training = self._recipe.training
        if training.train_iters is not None:
            return training.train_iters
        assert training.train_tokens is not None
        seq_length = self._recipe.data.seq_length
        words = self.word_tokens_per_step()
        consumed = (state.consumed_samples - state.phase_start_samples) * seq_length + state.phase_step * words
        remaining = training.train_tokens - state.phase_start_tokens - consumed
        # Counted from the current step, since a resumed run may have used another batch size. In integers, so that it
        # is the same at every step.
        iters = state.phase_step + remaining // (training.global_batch_size * seq_length + words)
        if iters < 1:
            raise UserError(
                f"training.train_tokens is {training.train_tokens}, of which the alignment phase consumed "
                f"{state.phase_start_tokens}; expected at least one step of {training.global_batch_size} x "
                f"{seq_length} tokens for language-model training; raise it"
            )
        return iters

    def word_tokens_per_step(self) -> int:
        """Tokens of dictionary words that a step takes from training.train_tokens, on average."""
        return 0

    def schedule_settings(self, state: TrainState) -> ScheduleSettings:
        section = self._recipe.optimizer
        return ScheduleSettings(
            lr=section.lr,
            min_lr=section.min_lr,
            decay_style=section.lr_decay_style,
            warmup_iters=section.lr_warmup_iters,
            decay_iters=self.total_iters(state),
        )

    def forward_backward(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        following = self.following(state)
        batches, counts = self._reader.read(
            self._samples_of(state), following=None if following is None else self._samples_of(following)
        )
        # Rank 0, which reports the counts, is in the first stage.
        self._counted_steps += counts is not None
        # The first and the last stage read the same samples; only the last one adds their counts.
        if counts is not None and self._runtime.is_last_stage:
            self._meter.add("counts", counts)
        self._run(chunks, batches)

    def _samples_of(self, state: TrainState) -> StepSamples:
        return StepSamples(
            state.consumed_samples,
            self._recipe.training.global_batch_size,
            consumed_tokens=state.tokens - state.phase_start_tokens,
        )

    def drain_waited_s(self) -> float:
        return self._reader.drain_waited_s()

    def end(self) -> None:
        self._reader.close()

    def _run(self, chunks: Sequence[torch.nn.Module], samples: Sequence[SampleMicrobatch]) -> None:
        """Forward and backward pass over the samples of a step."""
        microbatches = schedule_length(self._runtime, len(samples))

        def forward_step(
            iterator: Iterator[SampleMicrobatch], chunk: torch.nn.Module
        ) -> tuple[torch.Tensor, LossFunction]:
            return self._lm_step(chunk, next(iterator), microbatches)

        run_schedule(
            self._runtime,
            chunks,
            forward_step,
            samples,
            idle=lambda: idle_microbatch(self._runtime),
            shape=(self._recipe.data.seq_length, self._recipe.training.micro_batch_size),
            mixed_shapes=microbatches != len(samples),
        )

    def _lm_step(
        self, chunk: torch.nn.Module, samples: SampleMicrobatch, microbatches: int
    ) -> tuple[torch.Tensor, LossFunction]:
        output, loss_of = lm_loss_sum(chunk, samples)

        def loss_function(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss = loss_of(losses)
            self._meter.add("loss", loss)
            # Megatron-Core averages over microbatches and data-parallel ranks; `loss` is already the step's mean.
            return loss * (microbatches * self._runtime.data_size), {}

        return output, loss_function

    def advance(self, state: TrainState) -> None:
        samples = self._recipe.training.global_batch_size
        state.consumed_samples += samples
        state.tokens += samples * self._recipe.data.seq_length

    def metrics(self, steps: int) -> dict[str, Any]:
        sums = self._meter.drain()
        loss = sums["loss"][0] / steps
        values: dict[str, Any] = {"loss": loss, "lm_loss": loss}
        # At a ratio of 0 nothing is counted; omit the rates, since 0 would look like a measurement.
        if self._target_languages is not None and self._counted_steps:
            running, known, switched, padded, truncated, *by_language = sums["counts"]
            positions = self._counted_steps * self._recipe.training.global_batch_size * self._recipe.data.seq_length
            values["known_word_rate"] = known / max(running, 1.0)
            values["switched_word_rate"] = switched / max(running, 1.0)
            values["padding_share"] = padded / positions
            values["truncation_share"] = truncated / positions
            values["switched_words"] = {
                language: int(count) for language, count in zip(self._target_languages, by_language, strict=True)
            }
        self._counted_steps = 0
        return values
