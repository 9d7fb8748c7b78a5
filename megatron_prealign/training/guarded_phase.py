"""Language-model training with an alignment guard: some steps also include the words of an alignment step."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.recipe import AlignmentGuardSection, Recipe
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.training.language_model_phase import LanguageModelPhase
from megatron_prealign.training.microbatches import SampleMicrobatch, SampleReader
from megatron_prealign.training.phase import AlignmentMetrics
from megatron_prealign.training.word_steps import WordSteps


class GuardedLanguageModelPhase(LanguageModelPhase):
    """Minimises language-model loss and alignment loss together in every n-th step; with a floor, only while retrieval
    is below it."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        reader: SampleReader,
        words: WordSteps,
        *,
        target_languages: Sequence[str] | None,
    ) -> None:
        super().__init__(recipe, runtime, reader, target_languages=target_languages)
        assert recipe.alignment_guard is not None
        self._guard: AlignmentGuardSection = recipe.alignment_guard
        self._words = words
        self._with_words = False

    def word_tokens_per_step(self) -> int:
        # With a floor, the steps with words are not known in advance: their tokens exceed training.train_tokens.
        return 0 if self._guard.floor is not None else round(self._words.sampler.mean_tokens / self._guard.interval)

    def forward_backward(self, state: TrainState, chunks: Sequence[torch.nn.Module]) -> None:
        interval = self._guard.interval
        due = (state.phase_step + 1) % interval == 0
        self._with_words = due and (self._guard.floor is None or state.below_floor)
        if self._with_words:
            # First, because the schedule position of the next step, read ahead, includes the tokens of these words.
            last = state.phase_step + interval >= self.total_iters(state)
            self._words.draw(state.step, chunks, following=None if last else state.step + interval)
        super().forward_backward(state, chunks)

    def _run(self, chunks: Sequence[torch.nn.Module], samples: Sequence[SampleMicrobatch]) -> None:
        if self._with_words:
            self._words.run(chunks, samples, self._lm_step)
        else:
            super()._run(chunks, samples)

    def drain_waited_s(self) -> float:
        return super().drain_waited_s() + self._words.drain_waited_s()

    def end(self) -> None:
        super().end()
        self._words.close()

    def advance(self, state: TrainState) -> None:
        super().advance(state)
        if self._with_words:
            state.tokens += self._words.tokens

    def metrics(self, steps: int) -> dict[str, Any]:
        values = super().metrics(steps)
        words = self._words.metrics()
        values["word_steps"] = words["word_steps"]
        if words["word_steps"]:
            values["alignment_loss"] = words["alignment_loss"]
        return values

    def on_alignment_watch(self, state: TrainState, metrics: AlignmentMetrics) -> None:
        self._words.update_guard(state, metrics)
