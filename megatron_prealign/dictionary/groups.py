"""Puts word pairs together into groups: one source word with all its translations, in one or many languages.

Nothing here knows a tokenizer. What is left out is counted by rule, so that a user sees where the pairs of a file went.
Lists have millions of pairs: words are looked at once each and all at a time, pairs are arrays.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress, filterfalse
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
_HAS_LETTER, _HAS_SPACE, _TO_CLEAN, _OUTSIDE_ASCII = 1, 2, 4, 8
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


@dataclass(frozen=True)
class _Words:
    """Cleaned words of one column and what is known of each [N]."""

    texts: list[str]
    empty: NDArray[np.bool_]
    letter: NDArray[np.bool_]
    space: NDArray[np.bool_]


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one source and one target language [P]; words are numbers within their language."""

    source_language: int
    target_language: int
    place: NDArray[np.int64]
    """Place in the order of everything read."""
    source: NDArray[np.int64]
    target: NDArray[np.int64]
    weight: NDArray[np.float32]


@dataclass
class GroupBuilder:
    """Collects pairs from any number of files; pairs with the same source language and word join one group."""

    counts: Counter[str] = field(default_factory=Counter)
    _languages: dict[str, int] = field(default_factory=dict)
    _words: list[dict[str, int]] = field(default_factory=list)
    """Per language: word -> its number."""
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
        self._words += [{} for _ in range(len(self._languages) - len(self._words))]
        count, targets = len(columns[0]), len(columns) - 1
        weight = np.ones(count, dtype=np.float32) if weights is None else np.asarray(weights, dtype=np.float32)
        (sources, source), *translations = (self._look_at(column) for column in columns)
        for number, (words, target) in enumerate(translations):
            left = self._usable(sources, source, words, target)
            self._pairs.append(
                _Pairs(
                    ids[0],
                    ids[number + 1],
                    self._places + left * targets + number,
                    self._numbers(ids[0], sources.texts, source[left]),
                    self._numbers(ids[number + 1], words.texts, target[left]),
                    weight[left],
                )
            )
        self._places += count * targets
        self.counts[READ] += count * targets
        return count * targets

    def _look_at(self, column: list[str]) -> tuple[_Words, NDArray[np.int64]]:
        """The different words of a column, cleaned, and which of them stands in each row."""
        place = dict.fromkeys(column, 0)
        different = list(place)
        place.update(zip(different, range(len(different)), strict=True))
        rows = np.fromiter(map(place.__getitem__, column), np.int64, len(column))
        flags = _flags(different)
        empty = np.fromiter(map(len, different), np.int64, len(different)) == 0
        for index in np.flatnonzero(flags & _TO_CLEAN).tolist():
            word = different[index]
            cleaned = self._cleaned.get(word)
            if cleaned is None:
                cleaned = self._cleaned[word] = clean(word)
                self.counts[CLEANED] += cleaned != word.strip()
            different[index], empty[index] = cleaned, not cleaned
            flags[index] = has_letter(cleaned) * _HAS_LETTER | (" " in cleaned) * _HAS_SPACE
        return _Words(different, empty, flags & _HAS_LETTER != 0, flags & _HAS_SPACE != 0), rows

    def _usable(
        self, sources: _Words, source: NDArray[np.int64], words: _Words, target: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The rows that no rule takes."""
        keep = np.ones(len(source), dtype=bool)
        for rule, bad in (
            (EMPTY, sources.empty[source] | words.empty[target]),
            (MULTI_WORD_SOURCE, sources.space[source]),
            (WITHOUT_LETTER, ~(sources.letter[source] & words.letter[target])),
        ):
            self.counts[rule] += int((keep & bad).sum())
            keep &= ~bad
        return np.flatnonzero(keep)

    def _numbers(self, language: int, texts: list[str], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the words of `rows` within their language; new words get the next ones."""
        known = self._words[language]
        used = np.zeros(len(texts), dtype=bool)
        used[rows] = True
        words = list(compress(texts, used))
        new = dict.fromkeys(filterfalse(known.__contains__, words))
        known.update(zip(new, range(len(known), len(known) + len(new)), strict=True))
        numbers = np.zeros(len(texts), dtype=np.int64)
        numbers[used] = np.fromiter(map(known.__getitem__, words), np.int64, len(words))
        return numbers[rows]

    def build(self) -> Groups:
        """The groups of everything added so far."""
        sizes = [len(words) for words in self._words]
        first_text = np.cumsum([0, *sizes])
        source = _joined([pairs.source + first_text[pairs.source_language] for pairs in self._pairs], np.int64)
        target = _joined([pairs.target + first_text[pairs.target_language] for pairs in self._pairs], np.int64)
        weight = _joined([pairs.weight for pairs in self._pairs], np.float32)
        order = np.argsort(_joined([pairs.place for pairs in self._pairs], np.int64), kind="stable")
        source, target, weight = source[order], target[order], weight[order]
        # Groups are numbered in the order in which their source words come first.
        texts, first, source_rank = np.unique(source, return_index=True, return_inverse=True)
        by_mention = np.argsort(first)
        number = np.empty(len(texts), dtype=np.int64)
        number[by_mention] = np.arange(len(texts))
        group = number[source_rank]
        # Stable: what comes first of equal pairs is the first mention.
        _, once, same = np.unique(group * (first_text[-1] + 1) + target, return_index=True, return_inverse=True)
        self.counts[DUPLICATE] = len(group) - len(once)
        largest = np.zeros(len(once), dtype=np.float32)
        np.maximum.at(largest, same, weight)
        text_language = np.repeat(np.arange(len(sizes), dtype=np.int16), sizes)
        # By group and language; translations of one language keep the order of the files, where dictionaries put the
        # best first.
        order = np.lexsort((once, text_language[target[once]], group[once]))
        return Groups(
            languages=tuple(self._languages),
            texts=tuple(word for words in self._words for word in words),
            text_language=text_language,
            source=texts[by_mention].astype(np.int32),
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
