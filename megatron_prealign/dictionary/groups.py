"""Puts word pairs together into groups: one source word with all its translations, in one or many languages.

Nothing here knows a tokenizer. What is left out is counted by rule, so that a user sees where the pairs of a file went.
Lists have millions of pairs: words are looked at once each and all at a time, pairs are arrays.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, compress, filterfalse
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Zero-width space, soft hyphen, byte-order mark and direction marks: invisible, and they change the tokens. The
# zero-width joiners (U+200C, U+200D) are spelling in Persian and in Indic scripts and stay.
_INVISIBLE = re.compile("[\u200b\u00ad\ufeff\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CONTROL_OR_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")

# Rule names are what the user reads, in the order in which the rules apply.
READ = "pairs read"
EMPTY = "pairs without a word on one side"
MULTI_WORD_SOURCE = "pairs with a source of several words"
WITHOUT_LETTER = "pairs with a word without a letter"
DUPLICATE = "pairs given before"
CLEANED = "words cleaned (Unicode NFC, spaces, invisible characters)"

# Bits of what is known of a word.
_HAS_LETTER, _HAS_SPACE, _TO_CLEAN, _OUTSIDE_ASCII, _EMPTY = 1, 2, 4, 8, 16
_SPACE = ord(" ")


def clean(word: str) -> str:
    """`word` in Unicode NFC without invisible characters, its white space single and trimmed."""
    word = unicodedata.normalize("NFC", _INVISIBLE.sub("", word))
    return _CONTROL_OR_SPACE.sub(" ", word).strip()


def has_letter(word: str) -> bool:
    """True where at least one character is a letter of any script."""
    return any(character.isalpha() for character in word)


@dataclass(frozen=True)
class Groups:
    """Groups of words as texts; the words of all groups lie in one lexicon.

    Attributes:
        languages: codes; the index is the language id.
        texts: all different (language, word), the languages one after the other [T].
        text_language: language id of each text [T].
        source: text of each group's source word [G], groups in order of first mention.
        pair_group: group of each pair [P], ascending.
        pair_target: text of each pair's translation [P]; in a group by language, then in the files' order.
        pair_weight: weight of each pair [P], above 0; of a pair given several times the largest.
    """

    languages: tuple[str, ...]
    texts: tuple[str, ...]
    text_language: NDArray[np.int16]
    source: NDArray[np.int32]
    pair_group: NDArray[np.int32]
    pair_target: NDArray[np.int32]
    pair_weight: NDArray[np.float32]


@dataclass
class _Vocabulary:
    """The words of one language as they stand in the files, each looked at once; they are numbered as they come."""

    numbers: dict[str, int] = field(default_factory=dict)
    flags: list[NDArray[np.uint8]] = field(default_factory=list)
    """What is known of each word once it is clean."""
    cleaned: dict[int, int] = field(default_factory=dict)
    """Number of a word that had to be cleaned -> number of the clean word."""

    def number(self, column: list[str], cleaned: dict[str, str]) -> NDArray[np.int32]:
        """The number of each word; `cleaned` gets the words that had to be cleaned."""
        numbers = self.numbers
        new = list(dict.fromkeys(filterfalse(numbers.__contains__, column)))
        numbers.update(zip(new, range(len(numbers), len(numbers) + len(new)), strict=True))
        flags = _flags(new)
        dirty = np.flatnonzero(flags & _TO_CLEAN).tolist()
        for place in dirty:
            word = new[place]
            cleaned.setdefault(word, clean(word))
            flags[place] = _clean_flags(cleaned[word])
        self.flags.append(flags)
        if dirty:
            words = [cleaned[new[place]] for place in dirty]
            self.cleaned.update(zip([numbers[new[place]] for place in dirty], self.number(words, cleaned), strict=True))
        return np.fromiter(map(numbers.__getitem__, column), np.int32, len(column))

    def known(self) -> NDArray[np.uint8]:
        """What is known of each word."""
        self.flags = [_joined(self.flags, np.uint8)]
        return self.flags[0]

    def clean_numbers(self) -> NDArray[np.int64]:
        """For each word the number of the clean one."""
        numbers = np.arange(len(self.numbers))
        numbers[list(self.cleaned)] = list(self.cleaned.values())
        return numbers


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one source and one target language [P]; words are numbers of their vocabularies."""

    source_language: int
    target_language: int
    place: NDArray[np.int64]
    """Place in the order of everything read."""
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    weight: NDArray[np.float32]


@dataclass
class GroupBuilder:
    """Collects pairs from any number of files; pairs with the same source language and word join one group."""

    counts: Counter[str] = field(default_factory=Counter)
    _languages: dict[str, int] = field(default_factory=dict)
    _vocabularies: list[_Vocabulary] = field(default_factory=list)
    """Per language."""
    _pairs: list[_Pairs] = field(default_factory=list)
    _cleaned: dict[str, str] = field(default_factory=dict)
    _places: int = 0

    def add(
        self, entries: Iterable[Sequence[str]], languages: Sequence[str], weights: Sequence[float] | None = None
    ) -> int:
        """Adds entries whose words are in `languages`, source first; returns the number of pairs they hold."""
        columns = [list(column) for column in zip(*entries, strict=True)]
        return self.add_columns(columns, languages, weights) if columns else 0

    def add_columns(
        self, columns: Sequence[list[str]], languages: Sequence[str], weights: Sequence[float] | None = None
    ) -> int:
        """Adds entries column by column.

        Args:
            columns: the words of each language, equally many.
            languages: codes, source first.
            weights: weight of each entry, above 0; 1 if there are none.

        Returns:
            The number of pairs.
        """
        for rule in (READ, EMPTY, MULTI_WORD_SOURCE, WITHOUT_LETTER, DUPLICATE, CLEANED):
            self.counts[rule] += 0
        ids = [self._languages.setdefault(code, len(self._languages)) for code in languages]
        self._vocabularies += [_Vocabulary() for _ in range(len(self._languages) - len(self._vocabularies))]
        count, targets = len(columns[0]), len(columns) - 1
        weight = np.ones(count, dtype=np.float32) if weights is None else np.asarray(weights, dtype=np.float32)
        source, *translations = (
            self._vocabularies[language].number(column, self._cleaned)
            for language, column in zip(ids, columns, strict=True)
        )
        for number, (language, target) in enumerate(zip(ids[1:], translations, strict=True)):
            left = self._usable(ids[0], source, language, target)
            place = self._places + left * targets + number
            self._pairs.append(_Pairs(ids[0], language, place, source[left], target[left], weight[left]))
        self._places += count * targets
        self.counts[READ] += count * targets
        return count * targets

    def _usable(
        self, source_language: int, source: NDArray[np.int32], target_language: int, target: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """The rows that no rule takes."""
        source_flags = self._vocabularies[source_language].known()[source]
        target_flags = self._vocabularies[target_language].known()[target]
        keep = np.ones(len(source), dtype=bool)
        for rule, bad in (
            (EMPTY, (source_flags | target_flags) & _EMPTY),
            (MULTI_WORD_SOURCE, source_flags & _HAS_SPACE),
            (WITHOUT_LETTER, ~(source_flags & target_flags) & _HAS_LETTER),
        ):
            self.counts[rule] += int((keep & (bad != 0)).sum())
            keep &= bad == 0
        return np.flatnonzero(keep)

    def build(self) -> Groups:
        """The groups of everything added so far."""
        self.counts[CLEANED] = sum(cleaned != word.strip() for word, cleaned in self._cleaned.items())
        clean_numbers = [vocabulary.clean_numbers() for vocabulary in self._vocabularies]
        first = np.cumsum([0, *map(len, clean_numbers)])
        sources, targets = (
            [clean_numbers[language][numbers] + first[language] for language, numbers in side]
            for side in (
                [(pairs.source_language, pairs.source) for pairs in self._pairs],
                [(pairs.target_language, pairs.target) for pairs in self._pairs],
            )
        )
        source, target = _joined(sources, np.int64), _joined(targets, np.int64)
        weight = _joined([pairs.weight for pairs in self._pairs], np.float32)
        order = np.argsort(_joined([pairs.place for pairs in self._pairs], np.int64), kind="stable")
        # Only words of pairs become texts.
        used = np.zeros(first[-1], dtype=bool)
        used[source] = used[target] = True
        number = np.cumsum(used) - 1
        texts = compress(chain.from_iterable(each.numbers for each in self._vocabularies), used.tolist())
        language = np.repeat(np.arange(len(self._languages), dtype=np.int16), np.diff(first))
        return self._grouped(tuple(texts), language[used], number[source[order]], number[target[order]], weight[order])

    def _grouped(
        self,
        texts: tuple[str, ...],
        text_language: NDArray[np.int16],
        source: NDArray[np.int64],
        target: NDArray[np.int64],
        weight: NDArray[np.float32],
    ) -> Groups:
        """Pairs, in the order in which they were read, as groups."""
        # Groups are numbered in the order in which their source words come first.
        words, first, source_rank = np.unique(source, return_index=True, return_inverse=True)
        by_mention = np.argsort(first)
        number = np.empty(len(words), dtype=np.int64)
        number[by_mention] = np.arange(len(words))
        group = number[source_rank]
        # What comes first of equal pairs is the first mention.
        _, once, same = np.unique(group * (len(texts) + 1) + target, return_index=True, return_inverse=True)
        self.counts[DUPLICATE] = len(group) - len(once)
        largest = np.zeros(len(once), dtype=np.float32)
        np.maximum.at(largest, same, weight)
        # By group and language; translations of one language keep the order of the files, where dictionaries put the
        # best first.
        order = np.lexsort((once, text_language[target[once]], group[once]))
        return Groups(
            languages=tuple(self._languages),
            texts=texts,
            text_language=text_language,
            source=words[by_mention].astype(np.int32),
            pair_group=group[once][order].astype(np.int32),
            pair_target=target[once][order].astype(np.int32),
            pair_weight=largest[order],
        )


def _joined(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])


def _flags(words: list[str]) -> NDArray[np.uint8]:
    """What is known of each word; right but for words that are `_TO_CLEAN`."""
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    codes = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), dtype="<u4")
    flags = np.zeros(len(words), dtype=np.uint8)
    flags[lengths == 0] = _EMPTY
    filled = np.flatnonzero(lengths)
    if len(filled):
        end = np.cumsum(lengths)[filled]
        begin = end - lengths[filled]
        character = _character_flags(codes)
        space = codes == _SPACE
        double = np.flatnonzero(space[1:] & space[:-1])
        flags[filled] = np.bitwise_or.reduceat(character, begin)
        flags[filled[space[begin] | space[end - 1]]] |= _TO_CLEAN
        # Two spaces of neighbouring words, too, but those words have one at their end anyway.
        flags[filled[np.searchsorted(end, double, side="right")]] |= _TO_CLEAN
    for index in np.flatnonzero(flags & _OUTSIDE_ASCII).tolist():
        if not unicodedata.is_normalized("NFC", words[index]):
            flags[index] |= _TO_CLEAN
    return flags


def _clean_flags(word: str) -> int:
    return has_letter(word) * _HAS_LETTER | (" " in word) * _HAS_SPACE | (not word) * _EMPTY


def _character_flags(codes: NDArray[np.uint32]) -> NDArray[np.uint8]:
    present = np.zeros(0x110000, dtype=bool)
    present[codes] = True
    table = np.zeros(0x110000, dtype=np.uint8)
    for code in np.flatnonzero(present).tolist():
        character = chr(code)
        dirt = code != _SPACE and (_INVISIBLE.match(character) or _CONTROL_OR_SPACE.match(character))
        table[code] = (
            character.isalpha() * _HAS_LETTER
            | (code == _SPACE) * _HAS_SPACE
            | (_TO_CLEAN if dirt else 0)
            | (code > 127) * _OUTSIDE_ASCII
        )
    return table[codes]
