"""Token sequences of words, all in one array, and which of them are equal."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import MULTIPLIER, count_in_rows, hash_rows, offsets_of, row_indices
from megatron_prealign.dictionary.table import BOUNDARY_AFTER, BOUNDARY_BEFORE, HAS_LETTER
from megatron_prealign.progress import Progress
from megatron_prealign.tokenizer.base import Tokenizer

# Words: few enough for the arrays of a batch to stay in the caches.
_BATCH = 1 << 16


def letter_boundaries(tokenizer: Tokenizer) -> NDArray[np.uint8]:
    """The tokenizer's word boundaries `[vocab_size]` plus the bit that tells which tokens contain a letter."""
    flags = tokenizer.word_boundaries() & (BOUNDARY_BEFORE | BOUNDARY_AFTER)
    # A token without a boundary on one side starts or ends with a letter; of the others only the text can tell.
    letters = flags != (BOUNDARY_BEFORE | BOUNDARY_AFTER)
    for token in np.flatnonzero(~letters).tolist():
        if token not in tokenizer.special_ids:
            letters[token] = any(character.isalpha() for character in tokenizer.decode([token]))
    return (flags | np.where(letters, HAS_LETTER, 0)).astype(np.uint8)


class Rows(NamedTuple):
    """What is known of encoded words, each `[rows]`."""

    lengths: NDArray[np.int32]
    """Tokens."""
    usable: NDArray[np.bool_]
    """Not empty and without special tokens (an unknown word is one)."""
    single: NDArray[np.bool_]
    """No word starts behind the first token."""
    behind_space: NDArray[np.bool_]
    """One word behind a token that is nothing but the space before it."""
    hashes: NDArray[np.uint64]
    """64 bits; equal rows have equal ones."""


class SequenceLexicon:
    """Encodes words and keeps the ids of each as one row; rows are numbered in the order of encoding."""

    def __init__(self, tokenizer: Tokenizer, languages: Sequence[str], word_boundary: NDArray[np.uint8]) -> None:
        self._tokenizer = tokenizer
        self._languages = tuple(languages)
        self._word_boundary = word_boundary
        self._special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._special[list(tokenizer.special_ids)] = True
        marker = tokenizer.encode_word("")
        self._space_token = marker[0] if len(marker) == 1 else -1
        self.encoders: dict[str, None] = {}
        """What encoded the words, in order of first use."""
        self._tokens: list[NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
        self._known: list[Rows] = [self._look_at(self._tokens[0], np.zeros(1, dtype=np.int64))]
        self._count = 0
        self._offsets = np.zeros(1, dtype=np.int64)

    def encode(
        self, words: Sequence[str], language_ids: NDArray[np.int16], word_initial: bool, progress: Progress
    ) -> NDArray[np.int32]:
        """The row of each word `[len(words)]`."""
        rows = np.zeros(len(words), dtype=np.int32)
        for language in np.unique(language_ids).tolist():
            places = np.flatnonzero(language_ids == language)
            first, end = int(places[0]), int(places[-1]) + 1
            # Words of one language mostly lie together, and a slice of a list is nearly free.
            together = end - first == len(places)
            chosen = words[first:end] if together else [words[place] for place in places.tolist()]
            rows[places] = self._count + np.arange(len(places))
            for begin in range(0, len(chosen), _BATCH):
                batch = chosen[begin : begin + _BATCH]
                tokens, offsets = self._tokenizer.encode_word_rows(batch, self._languages[language], word_initial)
                self._tokens.append(tokens)
                self._known.append(self._look_at(tokens, offsets))
                self._count += len(batch)
                self.encoders[self._tokenizer.word_encoder] = None
                progress.update(len(batch))
        return rows

    def _look_at(self, tokens: NDArray[np.int32], offsets: NDArray[np.int64]) -> Rows:
        # Batch by batch: arrays that fit into the caches, in memory that is used again.
        lengths = np.diff(offsets)
        filled = lengths > 0
        first = offsets[:-1][filled]
        boundary = self._word_boundary[tokens]
        starts = np.zeros(len(tokens), dtype=bool)
        starts[1:] = (boundary[1:] & BOUNDARY_BEFORE) | (boundary[:-1] & BOUNDARY_AFTER) != 0
        starts[first] = False
        inner_starts = count_in_rows(starts, offsets)
        behind_space = inner_starts == 1
        behind_space[filled] &= tokens[first] == self._space_token
        return Rows(
            lengths.astype(np.int32),
            filled & (count_in_rows(self._special[tokens], offsets) == 0),
            inner_starts == 0,
            behind_space,
            hash_rows(tokens, offsets),
        )

    def known(self) -> Rows:
        """What is known of all rows."""
        if len(self._known) > 1:
            self._known = [Rows(*(np.concatenate(column) for column in zip(*self._known, strict=True)))]
        return self._known[0]

    def sequences(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All rows: `tokens` and `offsets`."""
        if len(self._tokens) > 1:
            self._tokens = [np.concatenate(self._tokens)]
            self._offsets = offsets_of(self.known().lengths)
        return self._tokens[0], self._offsets

    def same(self, left: NDArray[np.int32], right: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether two rows hold the same ids, for each pair of rows `[N]`."""
        tokens, offsets = self.sequences()
        lengths, hashes = self.known().lengths, self.known().hashes
        equal = np.empty(len(left), dtype=bool)
        for first in range(0, len(left), _BATCH):
            block = slice(first, first + _BATCH)
            np.equal(hashes[left[block]], hashes[right[block]], out=equal[block])
        # The hash says which rows can be equal; their ids say which are.
        candidates = np.flatnonzero(equal & (left != right))
        same_length = lengths[left[candidates]] == lengths[right[candidates]]
        equal[candidates[~same_length]] = False
        candidates = candidates[same_length]
        index, begin = row_indices(offsets, left[candidates])
        other, _ = row_indices(offsets, right[candidates])
        equal[candidates] = count_in_rows(tokens[index] != tokens[other], begin) == 0
        return equal

    def first_of_equal(self, rows: NDArray[np.int32], kind: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which of `rows` are the first of their `kind` (integers `[len(rows)]`) with their ids, ascending."""
        mixed = self.known().hashes[rows] + kind.astype(np.uint64) * MULTIPLIER
        _, first, number = np.unique(mixed, return_index=True, return_inverse=True)
        if (self.same(rows, rows[first[number]]) & (kind == kind[first[number]])).all():
            return np.sort(first)
        # Two sequences with one hash, once in millions of builds.
        tokens, offsets = self.sequences()
        found: dict[tuple[int, bytes], int] = {}
        for place, row in enumerate(rows.tolist()):
            found.setdefault((int(kind[place]), tokens[offsets[row] : offsets[row + 1]].tobytes()), place)
        return np.fromiter(found.values(), np.int64, len(found))

    def rows(self, numbers: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The chosen rows one after the other: `tokens` and `offsets` `[len(numbers)+1]`."""
        tokens, offsets = self.sequences()
        new_offsets = offsets_of(self.known().lengths[numbers])
        chosen = np.empty(new_offsets[-1], dtype=np.int32)
        # The indices of all of them at once would take several times the memory of the rows.
        for begin in range(0, len(numbers), _BATCH):
            end = min(begin + _BATCH, len(numbers))
            index, _ = row_indices(offsets, numbers[begin:end])
            np.take(tokens, index, out=chosen[new_offsets[begin] : new_offsets[end]])
        return chosen, new_offsets
