"""Helpers for tests of drawn words: a table whose ids identify the group of a word, and draws as plain values."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from support.word_table import Word, word_table

LANGUAGES = ("en", "de", "zh")
VOCAB_SIZE = 400
MAX_TOKENS = 3


def groups() -> list[list[Word]]:
    """24 groups; group g has ids from 10 g + 10 on, which identify the group of a drawn word."""
    made: list[list[Word]] = []
    for number in range(24):
        first = 10 * number + 10
        words: list[Word] = [("en", [first]), ("de", [first + 1, first + 2])]
        if number % 3 == 0:
            words.append(("de", [first + 3]))
        if number % 4 != 3:
            words.append(("zh", [first + 4, first + 5, first + 6]))
        made.append(words)
    made[5][1] = ("de", [61, 62, 63, 64])
    # Groups 20 to 22 cannot be drawn: they have only one language, or only words that are too long.
    made[20] = [("en", [210]), ("en", [211])]
    made[21] = [("en", [220, 221, 222, 223]), ("de", [224])]
    made[22] = [("en", [230]), ("de", [231, 232, 233, 234])]
    return made


# Group 23, the last of the table, is drawable.
UNDRAWABLE = {20, 21, 22}
HELD_OUT = {2, 7, 23}
# Words in one draw of all 18 groups: groups 3, 5, 11, 15 and 19 have two languages, the others three.
ALL_WORDS = 13 * 3 + 5 * 2


@dataclass
class Drawn:
    """A step as plain values.

    Attributes:
        words: the tokens of each word by data-parallel rank and microbatch; an empty list for an empty slot.
        group: index of each word's group, in the order in which ranks are gathered.
        positives, pairs: counts of the loss.
        host_pairs, tokens: counts of the sampler.
        shapes: rows and columns of each batch.
    """

    words: list[list[list[list[int]]]]
    group: list[int]
    positives: list[float]
    pairs: float
    host_pairs: int
    tokens: int
    shapes: list[tuple[int, int]]

    @property
    def flat(self) -> list[list[int]]:
        """The words of all ranks in order."""
        return [word for batches in self.words for batch in batches for word in batch]


@dataclass(frozen=True)
class Setting:
    """Table, section and layout that batches are drawn for."""

    groups: list[list[Word]]
    languages: tuple[str, ...] = LANGUAGES
    counts: list[int] | None = None
    held_out: frozenset[int] = frozenset()
    section: tuple[tuple[str, Any], ...] = ()
    seed: int = 3
    data_size: int = 1
    tensor_size: int = 1
    microbatches: int = 1
    packed: bool = True
    multiple: int = 1

    def section_with(self, **fields: Any) -> "Setting":
        return replace(self, section=(*self.section, *fields.items()))


USUAL = Setting(groups(), held_out=frozenset(HELD_OUT), section=(("words_per_step", 24),))


def sampler_of(setting: Setting) -> Any:
    from megatron_prealign.alignment.words import WordSampler
    from megatron_prealign.dictionary.alignment_groups import alignment_groups
    from megatron_prealign.recipe import AlignmentSection

    fields = {"train_iters": 1, "words_per_step": 24, "lr": 0.001, "max_word_tokens": MAX_TOKENS}
    section = AlignmentSection(**{**fields, **dict(setting.section)})
    table = word_table(setting.groups, setting.languages, vocab_size=VOCAB_SIZE, counts=setting.counts)
    held_out = np.array([number in setting.held_out for number in range(len(setting.groups))])
    return WordSampler(table, alignment_groups(table, section, held_out=held_out), section, setting.seed)


def draw(setting: Setting, steps: Iterable[int]) -> list[Drawn]:
    """Runs in a worker: the draws of all ranks in each step."""
    from megatron_prealign.alignment.layout import WordLayout

    sampler = sampler_of(setting)
    drawn = []
    for step in steps:
        parts = [
            sampler.draw(
                step,
                WordLayout(
                    data_size=setting.data_size,
                    tensor_size=setting.tensor_size,
                    data_rank=data_rank,
                    packed=setting.packed,
                    multiple=setting.multiple,
                    dtype=torch.float32,
                    device=torch.device("cpu"),
                ),
                microbatches=setting.microbatches,
            )
            for data_rank in range(setting.data_size)
        ]
        for part in parts[1:]:
            assert torch.equal(part.groups.group, parts[0].groups.group)
            assert (part.pairs, part.tokens) == (parts[0].pairs, parts[0].tokens)
        drawn.append(
            Drawn(
                words=[[words_of(batch) for batch in part.batches] for part in parts],
                group=parts[0].groups.group.tolist(),
                positives=parts[0].groups.positives.tolist(),
                pairs=parts[0].groups.pairs.item(),
                host_pairs=parts[0].pairs,
                tokens=parts[0].tokens,
                shapes=[tuple(batch.tokens.shape) for part in parts for batch in part.batches],
            )
        )
    return drawn


def words_of(batch: Any) -> list[list[int]]:
    """The words of a batch as the taps see them: the tokens at their indices where the weight is not 0."""
    rows, _ = batch.tokens.shape
    words = []
    for slot, (indices, weights) in enumerate(zip(batch.token_indices, batch.weights, strict=True)):
        inside = indices[weights > 0]
        tokens = batch.tokens[inside % rows, inside // rows].tolist()
        assert tokens == batch.word_tokens[slot, : len(tokens)].tolist()
        words.append(tokens)
    return words


def number_of(word: list[int]) -> int:
    """Group of a word in the table."""
    return (word[0] - 10) // 10


def groups_of(drawn: Drawn) -> list[int]:
    """Groups of the table in the order in which they were drawn."""
    return list(dict.fromkeys(number_of(word) for word in drawn.flat if word))


def choices_of(setting: Setting, number: int) -> list[tuple[str, list[list[int]]]]:
    """Languages of a group and their usable words, in the table's order of languages."""
    words = setting.groups[number]
    usable = [(code, [w for c, w in words if c == code and len(w) <= MAX_TOKENS]) for code in setting.languages]
    return [(code, choices) for code, choices in usable if choices]


def pairs_of_words(count: int) -> list[list[Word]]:
    return [[("en", [10 * number + 10]), ("de", [10 * number + 11])] for number in range(count)]
