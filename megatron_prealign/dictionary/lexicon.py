"""Token sequences of words, stored in one array, with equality tests."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import MULTIPLIER, count_in_rows, hash_rows, offsets_of, row_indices
from megatron_prealign.dictionary.table import BOUNDARY_AFTER, BOUNDARY_BEFORE, HAS_LETTER
from megatron_prealign.progress import Progress
from megatron_prealign.tokenizer.base import Tokenizer

# Words per batch: small enough for the arrays of a batch to stay in the CPU caches.
_BATCH = 1 << 16


def letter_boundaries(tokenizer: Tokenizer) -> NDArray[np.uint8]:
    """Returns the tokenizer's word boundaries `[vocab_size]` with the bit for tokens that contain a letter."""
    flags = tokenizer.word_boundaries() & (BOUNDARY_BEFORE | BOUNDARY_AFTER)
    # A token without a boundary on one side starts or ends with a letter; the others need their text checked.
    letters = flags != (BOUNDARY_BEFORE | BOUNDARY_AFTER)
    for token in np.flatnonzero(~letters).tolist():
        if token not in tokenizer.special_ids:
            letters[token] = any(character.isalpha() for character in tokenizer.decode([token]))
    return (flags | np.where(letters, HAS_LETTER, 0)).astype(np.uint8)


class RowInfo(NamedTuple):
    """Properties of encoded words, each `[rows]`."""

    lengths: NDArray[np.int32]
    """Number of tokens."""
    usable: NDArray[np.bool_]
    """Whether the row is not empty and has no special tokens (the unknown token is one)."""
    single: NDArray[np.bool_]
    """Whether no word starts after the first token."""
    after_space: NDArray[np.bool_]
    """Whether the row is one word after a token that is only the leading space."""
    hashes: NDArray[np.uint64]
    """64-bit hash; equal rows have equal hashes."""


class SequenceLexicon:
    """Encodes words and stores the ids of each as one row, in the order of encoding."""

    def __init__(self, tokenizer: Tokenizer, languages: Sequence[str], word_boundary: NDArray[np.uint8]) -> None:
        self._tokenizer = tokenizer
        self._languages = tuple(languages)
        self._word_boundary = word_boundary
        self._special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._special[list(tokenizer.special_ids)] = True
        marker = tokenizer.encode_word("")
        self._space_token = marker[0] if len(marker) == 1 else -1
        self.encoders: dict[str, None] = {}
        """Encoders that tokenised the words, in order of first use."""
        self._tokens: list[NDArray[np.int32]] = [np.zeros(0, dtype=np.int32)]
        self._row_info: list[RowInfo] = [self._compute_info(self._tokens[0], np.zeros(1, dtype=np.int64))]
        self._count = 0
        self._offsets = np.zeros(1, dtype=np.int64)

    def encode(
        self, words: Sequence[str], language_ids: NDArray[np.int16], word_initial: bool, progress: Progress
    ) -> NDArray[np.int32]:
        """Encodes words and returns the row of each `[len(words)]`."""
        rows = np.zeros(len(words), dtype=np.int32)
        for language in np.unique(language_ids).tolist():
            indices = np.flatnonzero(language_ids == language)
            first, end = int(indices[0]), int(indices[-1]) + 1
            # Words of one language are mostly contiguous, and a slice of a list is nearly free.
            contiguous = end - first == len(indices)
            chosen = words[first:end] if contiguous else [words[index] for index in indices.tolist()]
            rows[indices] = self._count + np.arange(len(indices))
            for begin in range(0, len(chosen), _BATCH):
                batch = chosen[begin : begin + _BATCH]
                tokens, offsets = self._tokenizer.encode_word_rows(batch, self._languages[language], word_initial)
                self._tokens.append(tokens)
                self._row_info.append(self._compute_info(tokens, offsets))
                self._count += len(batch)
                self.encoders[self._tokenizer.word_encoder] = None
                progress.update(len(batch))
        return rows

    def _compute_info(self, tokens: NDArray[np.int32], offsets: NDArray[np.int64]) -> RowInfo:
        # Called per batch, so that the arrays fit into the caches and their memory is reused.
        lengths = np.diff(offsets)
        filled = lengths > 0
        first = offsets[:-1][filled]
        boundary = self._word_boundary[tokens]
        starts = np.zeros(len(tokens), dtype=bool)
        starts[1:] = (boundary[1:] & BOUNDARY_BEFORE) | (boundary[:-1] & BOUNDARY_AFTER) != 0
        starts[first] = False
        inner_starts = count_in_rows(starts, offsets)
        after_space = inner_starts == 1
        after_space[filled] &= tokens[first] == self._space_token
        return RowInfo(
            lengths.astype(np.int32),
            filled & (count_in_rows(self._special[tokens], offsets) == 0),
            inner_starts == 0,
            after_space,
            hash_rows(tokens, offsets),
        )

    def row_info(self) -> RowInfo:
        """Returns the properties of all rows."""
        if len(self._row_info) > 1:
            self._row_info = [RowInfo(*(np.concatenate(column) for column in zip(*self._row_info, strict=True)))]
        return self._row_info[0]

    def sequences(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Returns `tokens` and `offsets` of all rows."""
        if len(self._tokens) > 1:
            self._tokens = [np.concatenate(self._tokens)]
            self._offsets = offsets_of(self.row_info().lengths)
        return self._tokens[0], self._offsets

    def same(self, left: NDArray[np.int32], right: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Whether the rows of each pair have equal ids `[N]`."""
        tokens, offsets = self.sequences()
        lengths, hashes = self.row_info().lengths, self.row_info().hashes
        equal = np.empty(len(left), dtype=bool)
        for first in range(0, len(left), _BATCH):
            block = slice(first, first + _BATCH)
            np.equal(hashes[left[block]], hashes[right[block]], out=equal[block])
        # Hashes preselect pairs; their ids are compared below.
        candidates = np.flatnonzero(equal & (left != right))
        same_length = lengths[left[candidates]] == lengths[right[candidates]]
        equal[candidates[~same_length]] = False
        candidates = candidates[same_length]
        index, begin = row_indices(offsets, left[candidates])
        other, _ = row_indices(offsets, right[candidates])
        equal[candidates] = count_in_rows(tokens[index] != tokens[other], begin) == 0
        return equal

    def first_of_equal(self, rows: NDArray[np.int32], kind: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the ascending indices into `rows` of the first row with each `kind` (integers `[len(rows)]`) and
        ids."""
        mixed = self.row_info().hashes[rows] + kind.astype(np.uint64) * MULTIPLIER
        _, first, number = np.unique(mixed, return_index=True, return_inverse=True)
        if (self.same(rows, rows[first[number]]) & (kind == kind[first[number]])).all():
            return np.sort(first)
        # A hash collision, once in millions of builds.
        tokens, offsets = self.sequences()
        firsts: dict[tuple[int, bytes], int] = {}
        for index, row in enumerate(rows.tolist()):
            firsts.setdefault((int(kind[index]), tokens[offsets[row] : offsets[row + 1]].tobytes()), index)
        return np.fromiter(firsts.values(), np.int64, len(firsts))

    def rows(self, numbers: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Returns `tokens` and `offsets` `[len(numbers)+1]` of the chosen rows, concatenated."""
        tokens, offsets = self.sequences()
        new_offsets = offsets_of(self.row_info().lengths[numbers])
        chosen = np.empty(new_offsets[-1], dtype=np.int32)
        # Indices of all rows at once would take several times the memory of the rows.
        for begin in range(0, len(numbers), _BATCH):
            end = min(begin + _BATCH, len(numbers))
            index, _ = row_indices(offsets, numbers[begin:end])
            np.take(tokens, index, out=chosen[new_offsets[begin] : new_offsets[end]])
        return chosen, new_offsets
