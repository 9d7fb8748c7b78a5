"""Draws the words of each alignment step from the dictionary.

The draw depends on (seed, step) only. Every rank draws the full global batch and keeps its part, so all ranks know
which words belong to the same group without communication, and the batch is the same in any layout.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_prealign.alignment.layout import WordLayout
from megatron_prealign.alignment.packing import WordBatch
from megatron_prealign.dictionary.alignment_groups import AlignmentGroups
from megatron_prealign.dictionary.ragged import row_indices
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.kernels import WordGroups, word_groups
from megatron_prealign.recipe import AlignmentSection
from megatron_prealign.runtime.transfer import to_device


@dataclass(frozen=True, eq=False)
class StepWords:
    """The words of one step.

    Attributes:
        batches: batches of this data-parallel rank, one per microbatch.
        groups: which words are translations of each other, in the order in which the ranks' words are gathered.
        pairs: number of ordered pairs of words of the same group.
        tokens: number of tokens of all words, over all ranks.
    """

    batches: list[WordBatch]
    groups: WordGroups
    pairs: int
    tokens: int


# Steps whose words are drawn to know how many tokens a step has.
_MEASURED_STEPS = 16


class WordSampler:
    """Draws groups until their words fill a step: one word per language of each group, or of some of its languages."""

    def __init__(self, table: DictionaryTable, usable: AlignmentGroups, section: AlignmentSection, seed: int) -> None:
        """
        Args:
            table: the dictionary.
            usable: the groups and words that `alignment_groups` selected for `section`.
            section: the recipe's alignment section.
            seed: seed of all draws.
        """
        self.table = table
        self.usable = usable
        self._section = section
        self._seed = seed
        self._log_weight: NDArray[np.float64] | None = None
        if section.frequency_exponent > 0:
            self._log_weight = section.frequency_exponent * np.log(self.usable.frequency + 1.0)
            self._cumulative = np.cumsum(np.exp(self._log_weight - self._log_weight.max()))
        weights = section.language_weights
        self._language_weight = np.array([weights.get(language, 1.0) for language in table.languages])

    @cached_property
    def mean_tokens(self) -> float:
        """Tokens of the words of a step, over all ranks: the mean of the first steps, equal on all ranks."""
        lengths = np.diff(self.table.word_offsets)
        words = [self._draw_words(step)[0] for step in range(_MEASURED_STEPS)]
        return sum(int(lengths[drawn[drawn >= 0]].sum()) for drawn in words) / _MEASURED_STEPS

    def draw(self, step: int, layout: WordLayout, *, microbatches: int = 1) -> StepWords:
        """Draws the words of `step` and returns this rank's part."""
        words, group = self._draw_words(step)
        offsets = self.table.word_offsets
        lengths = np.where(words >= 0, offsets[words + 1] - offsets[words], 0)
        column = np.arange(lengths.max())
        inside = column < lengths[:, None]
        tokens = self.table.word_tokens[np.where(inside, offsets[words][:, None] + column, 0)].astype(np.int64)
        sizes = np.bincount(group[group >= 0])
        return StepWords(
            batches=layout.batches(tokens, lengths, microbatches),
            groups=word_groups(to_device(torch.from_numpy(layout.by_rank(group, microbatches)), layout.device)),
            pairs=int((sizes * (sizes - 1)).sum()),
            tokens=int(lengths.sum()),
        )

    def _draw_words(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Table indices of the words, and for each word the index of its group in this step; int64 `[words_per_step]`,
        -1 in an empty slot."""
        random = np.random.Generator(np.random.Philox(key=np.array([self._seed, step], dtype=np.uint64)))
        wanted = self._section.words_per_step
        groups = self._draw_groups(random, min(-(-wanted // 2), len(self.usable.frequency)))
        place, offsets = row_indices(self.usable.place_offsets, groups)
        group = np.repeat(np.arange(len(groups)), np.diff(offsets))
        limit = self._section.languages_per_group
        if limit is not None:
            chosen = self._draw_languages(random, limit, place, group, offsets)
            place, group = place[chosen], group[chosen]
        place, group = place[:wanted], group[:wanted]
        if len(group) > 1 and group[-1] != group[-2]:
            # The last group was truncated to a single word.
            place, group = place[:-1], group[:-1]
        pick = (random.random(len(place)) * self.usable.counts[place]).astype(np.int64)
        empty = (0, wanted - len(place))
        return (
            np.pad(self.usable.words[self.usable.first[place] + pick], empty, constant_values=-1),
            np.pad(group, empty, constant_values=-1),
        )

    def _draw_groups(self, random: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Draws `size` distinct groups by weight, without replacement."""
        count = len(self.usable.frequency)
        if self._log_weight is None:
            return random.choice(count, size=size, replace=False)
        # Drawing with replacement and dropping repeats is drawing without replacement, at no cost per existing group.
        drawn = np.searchsorted(self._cumulative, random.random(2 * size) * self._cumulative[-1], side="right")
        # The product may round up to the sum itself.
        drawn = _without_repeats(np.minimum(drawn, count - 1))[:size]
        if len(drawn) == size:
            return drawn
        # A few groups have most of the weight. The order of exponential variables divided by weights continues the
        # draw (Efraimidis and Spirakis 2006); in logarithms, so that no weight underflows.
        waiting = np.log(random.exponential(size=count)) - self._log_weight
        waiting[drawn] = np.inf
        return np.concatenate([drawn, np.argsort(waiting, kind="stable")[: size - len(drawn)]])

    def _draw_languages(
        self,
        random: np.random.Generator,
        limit: int,
        place: NDArray[np.int64],
        group: NDArray[np.int64],
        offsets: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Indices into `place` of the languages to use: at most `limit` per group, drawn by the languages' weights."""
        waiting = random.exponential(size=len(place)) / self._language_weight[self.usable.language[place]]
        order = np.lexsort((waiting, group))
        rank = np.arange(len(place)) - offsets[group]
        return np.sort(order[rank < limit])


def _without_repeats(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Drops repeated values, keeping the first occurrence."""
    _, first = np.unique(values, return_index=True)
    return values[np.sort(first)]
