"""Puts word pairs together into groups: one source word with all its translations, in one or many languages.

Nothing here knows a tokenizer. What is left out is counted by rule, so that a user sees where the pairs of a file went.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

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
        texts: all different (language, word), in order of first mention [T].
        text_language: language id of each text [T].
        source: text of each group's source word [G].
        pair_group: group of each pair [P], ascending.
        pair_target: text of each pair's translation [P]; in a group by language, then in the files' order.
    """

    languages: tuple[str, ...]
    texts: tuple[str, ...]
    text_language: NDArray[np.int16]
    source: NDArray[np.int32]
    pair_group: NDArray[np.int32]
    pair_target: NDArray[np.int32]


@dataclass
class GroupBuilder:
    """Collects pairs from any number of files; pairs with the same source language and word join one group."""

    counts: Counter[str] = field(default_factory=Counter)
    _languages: dict[str, int] = field(default_factory=dict)
    _texts: dict[tuple[int, str], int] = field(default_factory=dict)
    _groups: dict[int, int] = field(default_factory=dict)
    _pairs: dict[tuple[int, int], None] = field(default_factory=dict)
    _cleaned: dict[str, str] = field(default_factory=dict)

    def add(self, entries: Iterable[Sequence[str]], languages: Sequence[str]) -> int:
        """Adds entries whose words are in `languages`, source first; returns the number of pairs they hold."""
        ids = [self._languages.setdefault(code, len(self._languages)) for code in languages]
        before = self.counts[READ]
        for entry in entries:
            source = self._clean(entry[0])
            for target, language in zip(entry[1:], ids[1:], strict=True):
                self.counts[READ] += 1
                self._add_pair(source, ids[0], self._clean(target), language)
        return self.counts[READ] - before

    def _clean(self, word: str) -> str:
        cleaned = self._cleaned.get(word)
        if cleaned is None:
            cleaned = self._cleaned[word] = clean(word)
            self.counts[CLEANED] += cleaned != word.strip()
        return cleaned

    def _add_pair(self, source: str, source_language: int, target: str, target_language: int) -> None:
        if not source or not target:
            self.counts[EMPTY] += 1
        elif " " in source:
            self.counts[MULTI_WORD_SOURCE] += 1
        elif not has_letter(source) or not has_letter(target):
            self.counts[WITHOUT_LETTER] += 1
        else:
            source_id = self._text_id(source_language, source)
            pair = (self._groups.setdefault(source_id, len(self._groups)), self._text_id(target_language, target))
            self.counts[DUPLICATE] += pair in self._pairs
            self._pairs[pair] = None

    def _text_id(self, language: int, word: str) -> int:
        return self._texts.setdefault((language, word), len(self._texts))

    def build(self) -> Groups:
        """The groups of everything added so far, in order of first mention."""
        text_language = np.fromiter((language for language, _ in self._texts), np.int16, len(self._texts))
        pairs = np.array(list(self._pairs), dtype=np.int32).reshape(-1, 2)
        # Stable: translations of one language keep the order of the files, where dictionaries put the best first.
        order = np.lexsort((text_language[pairs[:, 1]], pairs[:, 0]))
        return Groups(
            languages=tuple(self._languages),
            texts=tuple(word for _, word in self._texts),
            text_language=text_language,
            source=np.fromiter(self._groups, np.int32, len(self._groups)),
            pair_group=pairs[order, 0],
            pair_target=pairs[order, 1],
        )
