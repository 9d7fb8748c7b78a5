"""Draws the words of each alignment step from the dictionary.

The draw depends on (seed, step) alone. Every rank draws the whole global batch and keeps its part, so all ranks know
which words belong together without a message, and the batch is the same under any layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_prealign.alignment.objective import WordGroups
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError


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
    """Draws `groups_per_step` groups a step, and of each its source word and one word of every target language it
    has."""

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
        length = np.diff(table.word_offsets)
        self._usable = (length > 0) & (length <= max_word_tokens)
        words_left = (
            np.add.reduceat(self._usable.astype(np.int64), table.group_offsets[:-1]) if len(length) else np.zeros(0)
        )
        languages_left = self._languages_left()
        self.groups = np.flatnonzero((words_left >= 2) & (languages_left >= 2) & ~held_out)
        if len(self.groups) < groups_per_step:
            raise UserError(
                f"alignment.groups_per_step is {groups_per_step}, but the dictionary has {len(self.groups)} groups "
                f"with words in two languages of at most alignment.max_word_tokens ({max_word_tokens}) tokens outside "
                f"the held-out share (of {len(table.group_offsets) - 1}); lower it or build a larger table"
            )
        self.slots_per_group = len(table.languages)

    def _languages_left(self) -> np.ndarray:
        """Number of languages with a usable word, per group."""
        table = self.table
        count = len(table.group_offsets) - 1
        group_of_word = np.repeat(np.arange(count), np.diff(table.group_offsets))
        present = np.zeros((count, len(table.languages)), dtype=bool)
        present[group_of_word[self._usable], table.word_language[self._usable]] = True
        return present.sum(axis=1)

    def draw(self, step: int, *, rank: int, ranks: int, multiple: int, device: torch.device) -> WordBatch:
        """The batch of this rank for one step.

        Args:
            ranks: data-parallel size; divides `groups_per_step`.
            multiple: the padded word length is a multiple of this (the tensor-parallel size under sequence
                parallelism).
        """
        random = np.random.Generator(np.random.Philox(key=np.array([self.seed, step], dtype=np.uint64)))
        drawn = random.choice(self.groups, size=self.groups_per_step, replace=False)
        words, group_ids = self._slots(drawn, random)
        longest = max(len(word) for word in words)
        width = -(-longest // multiple) * multiple
        every = torch.from_numpy(group_ids)
        sizes = torch.bincount(every[every >= 0]).double()
        per_rank = len(words) // ranks
        own = slice(rank * per_rank, (rank + 1) * per_rank)
        tokens, pooling = pad_words(words[own], width)
        return WordBatch(
            tokens=torch.from_numpy(tokens).to(device),
            position_ids=torch.arange(width, device=device).expand(per_rank, width).contiguous(),
            pooling=torch.from_numpy(pooling).to(device),
            groups=WordGroups(
                every=every.to(device),
                own=every[own].to(device),
                pairs=(sizes * (sizes - 1)).sum().float().to(device),
            ),
            global_tokens=sum(len(word) for word in words),
        )

    def _slots(self, drawn: np.ndarray, random: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
        """One slot per group and language: the word's tokens (empty where the group lacks the language) and the
        group's number."""
        table = self.table
        empty = np.zeros(0, dtype=np.int64)
        words: list[np.ndarray] = []
        group_ids = np.full((len(drawn), self.slots_per_group), -1, dtype=np.int64)
        for number, group in enumerate(drawn):
            members = np.arange(table.group_offsets[group], table.group_offsets[group + 1])
            members = members[self._usable[members]]
            languages = table.word_language[members]
            for language in range(self.slots_per_group):
                choices = members[languages == language]
                if len(choices) == 0:
                    words.append(empty)
                    continue
                word = choices[random.integers(len(choices))]
                words.append(table.word_tokens[table.word_offsets[word] : table.word_offsets[word + 1]])
                group_ids[number, language] = number
        return words, group_ids.reshape(-1)
