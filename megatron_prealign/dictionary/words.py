"""Cleans words and computes the properties that the pair rules need, for batches of distinct words."""

import html
import re
import unicodedata
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.scripts import script_bits

# Zero-width space, soft hyphen, byte-order mark and direction marks are invisible but change the tokens. The
# zero-width joiners (U+200C, U+200D) are kept: they are part of the spelling in Persian and in Indic scripts.
_INVISIBLE = re.compile("[\u200b\u00ad\ufeff\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_CONTROL_OR_SPACE = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")
_OPENING, _CLOSING = "([{<（［｛【〔", ")]}>）］｝】〕"
_IN_BRACKETS = re.compile(
    "|".join(
        f"{re.escape(opening)}[^{re.escape(opening + closing)}]*{re.escape(closing)}"
        for opening, closing in zip(_OPENING, _CLOSING, strict=True)
    )
)
_BRACKET = re.compile(f"[{re.escape(_OPENING + _CLOSING)}]")
# An unclosed note extends to the end.
_OPEN_NOTE = re.compile(f"(?<=.)[{re.escape(_OPENING)}].*")
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]+);")
_WIKI = re.compile(r"'{2,}")

# Flag bits of a word; the bits of its scripts are above them.
HAS_LETTER, HAS_SPACE, TO_CLEAN, OUTSIDE_ASCII, EMPTY, HAS_NOTE = 1, 2, 4, 8, 16, 32
FIRST_SCRIPT_BIT = 8
_SPACE = ord(" ")


def clean(word: str, notes: bool = True) -> str:
    """Normalises `word` to Unicode NFC, removes invisible characters, collapses and trims white space.

    Args:
        notes: also remove notes in brackets and markup (`Bank <i>f</i> (Geld)` → `Bank`).
    """
    while True:
        cleaned = _without_notes(word) if notes else word
        cleaned = unicodedata.normalize("NFC", _INVISIBLE.sub("", cleaned))
        cleaned = _CONTROL_OR_SPACE.sub(" ", cleaned).strip()
        # A removal can create a new match, so repeat until nothing changes.
        if cleaned == word:
            return cleaned
        word = cleaned


def _without_notes(word: str) -> str:
    if _ENTITY.search(word):
        word = html.unescape(word)
    word = _WIKI.sub("", word)
    while (shorter := _IN_BRACKETS.sub(" ", word)) != word:
        word = shorter
    return _BRACKET.sub("", _OPEN_NOTE.sub("", word.strip()))


def has_note(word: str) -> bool:
    """Whether `word` contains a bracket or markup."""
    return bool(_BRACKET.search(word) or _ENTITY.search(word) or _WIKI.search(word))


class WordInfo(NamedTuple):
    """Properties of words, each `[N]`."""

    flags: NDArray[np.uint64]
    """The bits above and, from `FIRST_SCRIPT_BIT`, the scripts of the word's letters; `TO_CLEAN` may be a false
    positive."""
    characters: NDArray[np.int32]
    spaces: NDArray[np.int32]

    def take(self, words: NDArray[Any]) -> "WordInfo":
        """Returns the properties of the chosen words."""
        return WordInfo(self.flags[words], self.characters[words], self.spaces[words])


@dataclass(frozen=True)
class WordClassifier:
    """Computes the properties of words.

    Attributes:
        notes: whether words with a bracket or markup need cleaning.
    """

    notes: bool = True

    def classify(self, words: list[str]) -> WordInfo:
        """Returns the properties of raw `words`."""
        lengths = np.fromiter(map(len, words), np.int32, len(words))
        codes = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), dtype="<u4")
        flags = np.zeros(len(words), dtype=np.uint64)
        spaces = np.zeros(len(words), dtype=np.int32)
        flags[lengths == 0] = EMPTY
        filled = np.flatnonzero(lengths)
        if len(filled):
            end = np.cumsum(lengths, dtype=np.int64)[filled]
            begin = end - lengths[filled]
            space = codes == _SPACE
            double = np.flatnonzero(space[1:] & space[:-1])
            flags[filled] = np.bitwise_or.reduceat(_CHARACTERS.flags(codes), begin)
            if space.any():
                spaces[filled] = np.add.reduceat(space, begin, dtype=np.int32)
            flags[filled[space[begin] | space[end - 1]]] |= np.uint64(TO_CLEAN)
            # Also matches the boundary of two words, but those have a leading or trailing space anyway.
            flags[filled[np.searchsorted(end, double, side="right")]] |= np.uint64(TO_CLEAN)
        for index in np.flatnonzero(flags & np.uint64(OUTSIDE_ASCII)).tolist():
            if not unicodedata.is_normalized("NFC", words[index]):
                flags[index] |= np.uint64(TO_CLEAN)
        if self.notes:
            for index in np.flatnonzero(flags & np.uint64(HAS_NOTE)).tolist():
                if has_note(words[index]):
                    flags[index] |= np.uint64(TO_CLEAN)
        return WordInfo(flags, lengths, spaces)


class _CharacterTable:
    """Flags of characters, computed on first use."""

    def __init__(self) -> None:
        self._flags = np.zeros(0x110000, dtype=np.uint64)
        self._known = np.zeros(0x110000, dtype=bool)
        for begin, end, bit in script_bits(FIRST_SCRIPT_BIT):
            self._flags[begin : end + 1] |= np.uint64(bit)

    def flags(self, codes: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Returns the flags of each character."""
        present = np.zeros(0x110000, dtype=bool)
        present[codes] = True
        for code in np.flatnonzero(present & ~self._known).tolist():
            self._flags[code] = self._compute(code)
            self._known[code] = True
        return self._flags[codes]

    def _compute(self, code: int) -> int:
        character = chr(code)
        dirt = code != _SPACE and (_INVISIBLE.match(character) or _CONTROL_OR_SPACE.match(character))
        letter = character.isalpha()
        return (
            letter * HAS_LETTER
            | (code == _SPACE) * HAS_SPACE
            | (TO_CLEAN if dirt else 0)
            | (code > 127) * OUTSIDE_ASCII
            | (character in "&'" or bool(_BRACKET.match(character))) * HAS_NOTE
            # Digits and punctuation are shared by many scripts.
            | (int(self._flags[code]) if letter else 0)
        )


_CHARACTERS = _CharacterTable()
