"""Draws the words of each alignment step from the dictionary.

The draw depends on (seed, step) alone. Every rank draws the whole global batch and keeps its part, so all ranks know
which words belong together without a message, and the batch is the same under any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_prealign.alignment.objective import WordGroups
from megatron_prealign.dictionary.alignment_groups import alignment_groups
from megatron_prealign.dictionary.table import DictionaryTable


@dataclass(frozen=True, eq=False)
class WordBatch:
    """Words of one data-parallel rank, each fed alone.

    Attributes:
        tokens: int64 `[slots, tokens]`, padded with 0 after each word.
        position_ids: int64 `[slots, tokens]`.
        pooling: float32 `[slots, tokens]`, 1/length on a word's tokens, 0 elsewhere: a weighted sum is the mean.
        groups: which words mean the same.
        global_tokens: tokens of all words of all ranks.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    pooling: torch.Tensor
    groups: WordGroups
    global_tokens: int


def pad_words(words: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids `[words, width]` and pooling weights of the same shape; an empty word has weights of zero."""
    tokens = np.zeros((len(words), width), dtype=np.int64)
    pooling = np.zeros((len(words), width), dtype=np.float32)
    for row, word in enumerate(words):
        tokens[row, : len(word)] = word
        pooling[row, : len(word)] = 1.0 / max(len(word), 1)
    return tokens, pooling


class WordSampler:
    """Draws `groups_per_step` groups a step, and of each group one word of every language it has."""

    def __init__(
        self,
        table: DictionaryTable,
        *,
        held_out: np.ndarray,
        groups_per_step: int,
        max_word_tokens: int,
        seed: int,
    ) -> None:
        """
        Args:
            held_out: bool `[groups]`, groups never drawn.
            max_word_tokens: longer words are left out; a group needs two words that stay.

        Raises:
            UserError: fewer groups are left than one step draws.
        """
        self.table = table
        self.groups_per_step = groups_per_step
        self.seed = seed
        self.slots_per_group = len(table.languages)
        found = alignment_groups(
            table, held_out=held_out, groups_per_step=groups_per_step, max_word_tokens=max_word_tokens
        )
        self._words, self._places, self._first, self._count, self.groups = found

    def draw(self, step: int, *, rank: int, ranks: int, multiple: int, device: torch.device) -> WordBatch:
        """The batch of this rank for one step.

        Args:
            ranks: data-parallel size; divides `groups_per_step`.
            multiple: the padded word length is a multiple of this (the tensor-parallel size under sequence
                parallelism).
        """
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64)))
        drawn = random.choice(self.groups, size=self.groups_per_step, replace=False)
        words = self._choose_words(drawn, random)
        offsets = self.table.word_offsets
        lengths = np.where(words >= 0, offsets[words + 1] - offsets[words], 0)
        width = -(-int(lengths.max()) // multiple) * multiple
        numbers = np.repeat(np.arange(len(drawn)), self.slots_per_group)
        every = torch.from_numpy(np.where(words >= 0, numbers, -1))
        sizes = np.bincount(numbers[words >= 0]).astype(np.float64)
        per_rank = len(words) // ranks
        own = slice(rank * per_rank, (rank + 1) * per_rank)
        column = np.arange(width)
        inside = column < lengths[own, None]
        tokens = self.table.word_tokens[np.where(inside, offsets[words[own], None] + column, 0)]
        pooling = inside / np.maximum(lengths[own, None], 1)
        return WordBatch(
            tokens=torch.from_numpy(np.where(inside, tokens, 0).astype(np.int64)).to(device),
            position_ids=torch.arange(width, device=device).expand(per_rank, width).contiguous(),
            pooling=torch.from_numpy(pooling.astype(np.float32)).to(device),
            groups=WordGroups(
                every=every.to(device),
                own=every[own].to(device),
                pairs=torch.tensor((sizes * (sizes - 1)).sum(), dtype=torch.float32, device=device),
            ),
            global_tokens=int(lengths.sum()),
        )

    def _choose_words(self, drawn: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """One word of each language of each drawn group, int64 `[groups * languages]`; -1 where there is none."""
        wanted = (drawn[:, None] * self.slots_per_group + np.arange(self.slots_per_group)).reshape(-1)
        at = np.minimum(np.searchsorted(self._places, wanted), len(self._places) - 1)
        pick = self._first[at] + (random.random(len(wanted)) * self._count[at]).astype(np.int64)
        return np.where(self._places[at] == wanted, self._words[pick], -1)
