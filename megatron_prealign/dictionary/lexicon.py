"""Token sequences of words, all in one array, and which of them are equal."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.tokenizer import Tokenizer
from megatron_prealign.dictionary.table import BOUNDARY_AFTER, BOUNDARY_BEFORE, HAS_LETTER, count_in_rows, row_indices
from megatron_prealign.progress import Progress

# Small enough for progress to move.
_BATCH = 1 << 18
# Odd, with bits all over: 2^64 divided by the golden ratio.
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def letter_boundaries(tokenizer: Tokenizer) -> NDArray[np.uint8]:
    """The tokenizer's word boundaries `[vocab_size]` plus the bit that tells which tokens contain a letter."""
    flags = tokenizer.word_boundaries() & (BOUNDARY_BEFORE | BOUNDARY_AFTER)
    # A token without a boundary on one side starts or ends with a letter; of the others only the text can tell.
    letters = flags != (BOUNDARY_BEFORE | BOUNDARY_AFTER)
    for token in np.flatnonzero(~letters).tolist():
        if token not in tokenizer.special_ids:
            letters[token] = any(character.isalpha() for character in tokenizer.decode([token]))
    return (flags | np.where(letters, HAS_LETTER, 0)).astype(np.uint8)


class SequenceLexicon:
    """Encodes words and keeps the ids of each as one row; rows are numbered in the order of encoding."""

    def __init__(self, tokenizer: Tokenizer, languages: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._languages = tuple(languages)
        marker = tokenizer.encode_word("")
        self.space_token = marker[0] if len(marker) == 1 else -1
        """The token that is nothing but the space before a word; -1 if there is none."""
        self.encoders: dict[str, None] = {}
        """What encoded the words, in order of first use."""
        self._tokens, self._offsets = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
        self._hashes = np.zeros(0, dtype=np.uint64)
        # Rows encoded since the arrays above were made; only `sequences` puts them together.
        self._new: list[tuple[NDArray[np.int32], NDArray[np.int64]]] = []
        self._count = 0

    def encode(
        self, words: Sequence[str], language_ids: NDArray[np.int16], word_initial: bool, progress: Progress
    ) -> NDArray[np.int64]:
        """The row of each word `[len(words)]`."""
        rows = np.zeros(len(words), dtype=np.int64)
        for language in np.unique(language_ids).tolist():
            places = np.flatnonzero(language_ids == language)
            chosen = words if len(places) == len(words) else [words[place] for place in places.tolist()]
            rows[places] = self._count + np.arange(len(places))
            for begin in range(0, len(chosen), _BATCH):
                batch = chosen[begin : begin + _BATCH]
                self._new.append(self._tokenizer.encode_word_rows(batch, self._languages[language], word_initial))
                self._count += len(batch)
                self.encoders[self._tokenizer.word_encoder] = None
                progress.update(len(batch))
        return rows

    def sequences(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All rows: `tokens` and `offsets`."""
        if self._new:
            tokens = [self._tokens, *(tokens for tokens, _ in self._new)]
            begin = np.cumsum([len(part) for part in tokens])
            offsets = [offsets[1:] + first for (_, offsets), first in zip(self._new, begin, strict=False)]
            hashes = [_hash_rows(tokens, offsets) for tokens, offsets in self._new]
            self._tokens = np.concatenate(tokens)
            self._offsets = np.concatenate([self._offsets, *offsets])
            self._hashes = np.concatenate([self._hashes, *hashes])
            self._new.clear()
        return self._tokens, self._offsets

    def same(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether two rows hold the same ids, for each pair of rows `[N]`."""
        tokens, offsets = self.sequences()
        equal = self._hashes[left] == self._hashes[right]
        # The hash says which rows can be equal; their ids say which are.
        candidates = np.flatnonzero(equal & (left != right))
        lengths = np.diff(offsets)
        same_length = lengths[left[candidates]] == lengths[right[candidates]]
        equal[candidates[~same_length]] = False
        candidates = candidates[same_length]
        index, begin = row_indices(offsets, left[candidates])
        other, _ = row_indices(offsets, right[candidates])
        equal[candidates] = count_in_rows(tokens[index] != tokens[other], begin) == 0
        return equal

    def first_of_equal(self, rows: NDArray[np.int64], kind: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of `rows` are the first of their `kind` (integers `[len(rows)]`) with their ids, ascending."""
        self.sequences()
        mixed = self._hashes[rows] + kind.astype(np.uint64) * _MULTIPLIER
        _, first, number = np.unique(mixed, return_index=True, return_inverse=True)
        if (self.same(rows, rows[first[number]]) & (kind == kind[first[number]])).all():
            return np.sort(first)
        # Two sequences with one hash, once in millions of builds.
        tokens, offsets = self.sequences()
        found: dict[tuple[int, bytes], int] = {}
        for place, row in enumerate(rows.tolist()):
            found.setdefault((int(kind[place]), tokens[offsets[row] : offsets[row + 1]].tobytes()), place)
        return np.fromiter(found.values(), np.int64, len(found))

    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.diff(self.sequences()[1])

    def usable(self) -> NDArray[np.bool_]:
        """Per row: not empty and without special tokens (an unknown word is one)."""
        tokens, offsets = self.sequences()
        special = np.zeros(self._tokenizer.vocab_size, dtype=bool)
        special[list(self._tokenizer.special_ids)] = True
        return (np.diff(offsets) > 0) & (count_in_rows(special[tokens], offsets) == 0)

    def word_starts(self, word_boundary: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Per row: how many words start in it behind its first token; 0 makes it one word."""
        tokens, offsets = self.sequences()
        starts = np.zeros(len(tokens), dtype=bool)
        boundary = word_boundary[tokens]
        starts[1:] = (boundary[1:] & BOUNDARY_BEFORE) | (boundary[:-1] & BOUNDARY_AFTER) != 0
        lengths = np.diff(offsets)
        starts[offsets[:-1][lengths > 0]] = False
        return count_in_rows(starts, offsets)

    def first_tokens(self) -> NDArray[np.int32]:
        """The first token of every row, -1 where it is empty."""
        tokens, offsets = self.sequences()
        first = np.full(len(offsets) - 1, -1, dtype=np.int32)
        filled = np.diff(offsets) > 0
        first[filled] = tokens[offsets[:-1][filled]]
        return first

    def rows(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The chosen rows one after the other: `tokens` and `offsets` `[len(numbers)+1]`."""
        tokens, offsets = self.sequences()
        index, new_offsets = row_indices(offsets, numbers)
        return tokens[index], new_offsets


def _hash_rows(tokens: NDArray[np.int32], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 bits of each row; equal rows have equal ones."""
    lengths = np.diff(offsets)
    place = np.arange(len(tokens), dtype=np.int64) - np.repeat(offsets[:-1], lengths)
    factors = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _MULTIPLIER))
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * _MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    mixed *= factors[place]
    hashes = np.zeros(len(lengths), dtype=np.uint64)
    filled = lengths > 0
    hashes[filled] = np.add.reduceat(mixed, offsets[:-1][filled]) if filled.any() else 0
    return hashes
