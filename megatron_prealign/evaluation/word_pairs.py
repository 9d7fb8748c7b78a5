"""Which words of the dictionary a measure of word retrieval asks for. Imports no torch."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import AlignmentWatchSection

# Longer words say little about a layer's word space and would make every batch of words as wide.
MAX_WORD_TOKENS = 8


@dataclass(frozen=True, eq=False)
class WordPairs:
    """Words of two languages and which of them translate each other.

    Words that are spelled by the same tokens are one word: their states are equal, and nothing could tell them apart.

    Attributes:
        languages: codes of the source words' and of the target words' language.
        source, target: token ids of each word; every word has a translation among the others.
        links: int64 `[pairs, 2]`, the numbers of a source word and of a target word that mean the same; each pair once,
            in order.
    """

    languages: tuple[str, str]
    source: list[NDArray[np.int32]]
    target: list[NDArray[np.int32]]
    links: NDArray[np.int64]

    @classmethod
    def of(cls, languages: tuple[str, str], pairs: Iterable[tuple[tuple[int, ...], tuple[int, ...]]]) -> "WordPairs":
        """From pairs of words, each as its token ids."""
        source: dict[tuple[int, ...], int] = {}
        target: dict[tuple[int, ...], int] = {}
        links = {(source.setdefault(one, len(source)), target.setdefault(other, len(target))) for one, other in pairs}
        return cls(
            languages=languages,
            source=[np.array(word, dtype=np.int32) for word in source],
            target=[np.array(word, dtype=np.int32) for word in target],
            links=np.array(sorted(links), dtype=np.int64),
        )

    @property
    def name(self) -> str:
        """From source to target, such as `en-de`."""
        return "-".join(self.languages)

    @property
    def directions(self) -> tuple[str, str]:
        """There and back, such as `en-de` and `de-en`."""
        return self.name, "-".join(reversed(self.languages))


def word_pairs(
    table: DictionaryTable, groups: NDArray[np.bool_], *, limit: int, max_word_tokens: float = MAX_WORD_TOKENS
) -> list[WordPairs]:
    """Pairs of a group's source word and its first translation in each language.

    Two languages make one list of pairs, whichever of them a group's source word is in; the first group decides which
    one the list calls the source.

    Args:
        groups: bool `[groups]`, the groups to take from.
        limit: pairs per language pair; the most frequent in the counting corpus, then the first in the table.
        max_word_tokens: longer words are left out.
    """
    order = np.argsort(-table.group_count, kind="stable")
    # Languages -> pairs of words in the order they are met; a dictionary, so that each is there once.
    chosen: dict[tuple[int, int], dict[tuple[tuple[int, ...], tuple[int, ...]], None]] = {}
    for group in order[groups[order]]:
        members = range(table.group_offsets[group], table.group_offsets[group + 1])
        words = [
            (int(table.word_language[w]), table.word_tokens[table.word_offsets[w] : table.word_offsets[w + 1]])
            for w in members
        ]
        words = [(language, tokens) for language, tokens in words if 0 < len(tokens) <= max_word_tokens]
        if not words or words[0][0] != table.word_language[members[0]]:
            continue
        source_language, source = words[0]
        seen: set[int] = {source_language}
        for language, tokens in words[1:]:
            if language in seen:
                continue
            seen.add(language)
            languages, pair = (source_language, language), (tuple(source.tolist()), tuple(tokens.tolist()))
            if languages[::-1] in chosen:
                languages, pair = languages[::-1], pair[::-1]
            pairs = chosen.setdefault(languages, {})
            if len(pairs) < limit:
                pairs[pair] = None
    return [
        WordPairs.of((table.languages[first], table.languages[second]), pairs)
        for (first, second), pairs in sorted(chosen.items())
    ]


def watched_pairs(
    table: DictionaryTable, held_out: NDArray[np.bool_], section: AlignmentWatchSection, *, max_word_tokens: float
) -> list[WordPairs]:
    """The pairs that the alignment watch measures.

    Args:
        held_out: bool `[groups]`, the groups that training leaves out.
        max_word_tokens: what the model has positions for (`Recipe.max_word_tokens`).

    Raises:
        UserError: no such pair is in the table.
    """
    groups = held_out if section.groups == "held_out" else ~held_out
    limit = min(MAX_WORD_TOKENS, max_word_tokens)
    pairs = word_pairs(table, groups, limit=section.words, max_word_tokens=limit)
    if not pairs:
        other = "raise dictionary.held_out_fraction or set alignment_watch.groups to trained"
        raise UserError(
            f"alignment_watch.groups is {section.groups}, but of these {int(groups.sum())} word groups of "
            f"{table.path or 'the dictionary table'} none has a pair of words of at most {limit} tokens; "
            + (
                other
                if section.groups == "held_out"
                else "lower dictionary.held_out_fraction or add words to the table"
            )
        )
    return pairs
