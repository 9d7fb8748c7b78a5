"""Language-model training that keeps words aligned: some of its steps carry the words of an alignment step."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.recipe import AlignmentGuardSection, Recipe
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.training.language_model_phase import LanguageModelPhase
from megatron_prealign.training.phase import AlignmentMeasures
from megatron_prealign.training.rows import RowMicrobatch, RowReader
from megatron_prealign.training.word_steps import WordSteps


class GuardedLanguageModelPhase(LanguageModelPhase):
    """Every n-th step, or every n-th while retrieval is below the floor, minimises the language-model loss and the
    alignment loss together."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        reader: RowReader,
        words: WordSteps,
        *,
        target_languages: Sequence[str] | None,
    ) -> None:
        super().__init__(recipe, runtime, reader, target_languages=target_languages)
        assert recipe.alignment_guard is not None
        self._guard: AlignmentGuardSection = recipe.alignment_guard
        self._words = words
        self._carried = False

    def _run(self, state: TrainState, chunks: Sequence[torch.nn.Module], rows: Sequence[RowMicrobatch]) -> None:
        due = (state.phase_step + 1) % self._guard.interval == 0
        self._carried = due and (self._guard.floor is None or state.below_floor)
        if self._carried:
            self._words.run(state.step, chunks, rows, self._row_step, next_step=state.step + self._guard.interval)
        else:
            super()._run(state, chunks, rows)

    def advance(self, state: TrainState) -> None:
        super().advance(state)
        if self._carried:
            state.tokens += self._words.tokens

    def metrics(self, steps: int) -> dict[str, Any]:
        values = super().metrics(steps)
        words = self._words.metrics()
        values["word_steps"] = words["word_steps"]
        if words["word_steps"]:
            values["alignment_loss"] = words["alignment_loss"]
        return values

    def saw_alignment(self, state: TrainState, measured: AlignmentMeasures) -> None:
        self._words.note_retrieval(state, measured)
