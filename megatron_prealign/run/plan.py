"""What a run will read: steps, tokens, and passes over each source. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_prealign.recipe import ALIGNMENT, Recipe
from megatron_prealign.run.dictionary import DictionaryParts

MANY_PASSES = 16
"""Passes over a source from which on a summary warns. Muennighoff et al. (arXiv 2305.16264) find that up to 4 passes
are worth almost as much as new text. In their fit, one more pass after n repetitions is worth exp(-n / 15.4) of new
text: 0.38 after 16 passes."""


@dataclass(frozen=True)
class PhaseLength:
    """Length of a phase, as planned for a run without an early stop."""

    name: str
    steps: int
    samples: int
    """Samples of the training blend in all steps, over all ranks."""
    word_tokens: int
    """Tokens of dictionary words in all steps: an estimate, since words are drawn at random."""


@dataclass(frozen=True)
class SourceTokens:
    """A source of the training blend."""

    path: str
    language: str
    weight: float
    tokens: int
    """Tokens of its training documents."""


@dataclass(frozen=True)
class SourcePasses:
    """How much a run reads of a source."""

    source: SourceTokens
    share: float
    """Fraction of the samples."""
    tokens: int
    """Tokens read over the whole run."""

    @property
    def passes(self) -> float:
        """Passes (epochs) over the source."""
        return self.tokens / self.source.tokens


def tokens_per_word(dictionary: DictionaryParts | None) -> float:
    """Expected number of tokens of a word that an alignment step draws; 0.0 without alignment.

    Every language of a group is drawn equally often here; language_weights and frequency_exponent may change that.
    """
    if dictionary is None or dictionary.words is None:
        return 0.0
    words = dictionary.words
    lengths = np.diff(dictionary.table.word_offsets)[words.words]
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return float(((ends[words.first + words.counts] - ends[words.first]) / words.counts).mean())


def dictionary_passes(recipe: Recipe, dictionary: DictionaryParts) -> float:
    """How often the alignment phase draws a word of the dictionary, on average; words of one language in a group count
    as one, since a draw takes one of them."""
    assert recipe.alignment is not None and dictionary.words is not None
    return recipe.alignment.train_iters * recipe.alignment.words_per_step / len(dictionary.words.first)


def phase_lengths(recipe: Recipe, word_length: float) -> list[PhaseLength]:
    """Lengths of the phases of `recipe.phases`.

    With training.train_tokens, the steps of language-model training after an alignment phase are an estimate, because
    the words of the phase use part of the tokens.

    Args:
        word_length: Result of `tokens_per_word`.
    """
    lengths: list[PhaseLength] = []
    guard = recipe.alignment_guard
    words = 0.0 if recipe.alignment is None else recipe.alignment.words_per_step * word_length
    for plan in recipe.phases:
        steps = plan.train_iters
        if steps is None:
            assert recipe.training.train_tokens is not None
            used = sum(length.samples * recipe.data.seq_length + length.word_tokens for length in lengths)
            per_step = plan.samples * recipe.data.seq_length + (words / guard.interval if guard is not None else 0.0)
            steps = int(max(0, recipe.training.train_tokens - used) / per_step)
        with_words = steps if plan.name == ALIGNMENT else steps // guard.interval if guard is not None else 0
        lengths.append(PhaseLength(plan.name, steps, steps * plan.samples, round(with_words * words)))
    return lengths


def passes(lengths: Iterable[PhaseLength], sources: Sequence[SourceTokens], seq_length: int) -> list[SourcePasses]:
    """How much of each source the phases read together, by the weights of the sources."""
    tokens = sum(length.samples for length in lengths) * seq_length
    total = sum(source.weight for source in sources)
    return [SourcePasses(source, source.weight / total, round(tokens * source.weight / total)) for source in sources]
