"""Token sequences of words, every different sequence stored once, so that sequences compare as integers."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.tokenizer import Tokenizer
from megatron_prealign.dictionary.table import BOUNDARY_AFTER, BOUNDARY_BEFORE, HAS_LETTER, count_in_rows, row_indices
from megatron_prealign.progress import Progress

# Large enough for the tokenizers library to use all cores, small enough for progress to move.
_BATCH = 32768


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
    """Encodes words and gives every different token sequence a number.

    Two words have the same number exactly if their ids are the same, whatever their languages and spellings.
    """

    def __init__(self, tokenizer: Tokenizer, languages: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._languages = tuple(languages)
        marker = tokenizer.encode_word("")
        self.space_token = marker[0] if len(marker) == 1 else -1
        """The token that is nothing but the space before a word; -1 if there is none."""
        self._numbers: dict[tuple[int, ...], int] = {}
        # Sequences numbered since the arrays below were made; only `sequences` turns them into arrays.
        self._new_rows: list[tuple[int, ...]] = []
        self._tokens, self._offsets = np.zeros(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
        self._known: dict[tuple[int, bool, str], int] = {}

    def encode(
        self, words: Sequence[str], language_ids: NDArray[np.int16], word_initial: bool, progress: Progress
    ) -> NDArray[np.int64]:
        """The number of each word's sequence `[len(words)]`; words met before are not encoded again."""
        keys = [(int(language), word_initial, word) for language, word in zip(language_ids, words, strict=True)]
        missing: dict[int, dict[str, None]] = {}
        for key in keys:
            if key not in self._known:
                missing.setdefault(key[0], {})[key[2]] = None
        for language, new_words in missing.items():
            self._encode_new(language, list(new_words), word_initial, progress)
        progress.update(len(words) - sum(map(len, missing.values())))
        return np.fromiter((self._known[key] for key in keys), np.int64, len(keys))

    def _encode_new(self, language: int, words: list[str], word_initial: bool, progress: Progress) -> None:
        for begin in range(0, len(words), _BATCH):
            batch = words[begin : begin + _BATCH]
            rows = self._tokenizer.encode_words(batch, self._languages[language], word_initial)
            for word, row in zip(batch, rows, strict=True):
                self._known[language, word_initial, word] = self._number(tuple(row))
            progress.update(len(batch))

    def _number(self, row: tuple[int, ...]) -> int:
        number = self._numbers.get(row)
        if number is None:
            number = self._numbers[row] = len(self._numbers)
            self._new_rows.append(row)
        return number

    def sequences(self) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All sequences by number: `tokens` and `offsets`."""
        if self._new_rows:
            lengths = np.fromiter(map(len, self._new_rows), np.int64, len(self._new_rows))
            tokens = np.fromiter(chain.from_iterable(self._new_rows), np.int32, int(lengths.sum()))
            self._offsets = np.append(self._offsets, self._offsets[-1] + np.cumsum(lengths))
            self._tokens = np.append(self._tokens, tokens)
            self._new_rows.clear()
        return self._tokens, self._offsets

    def usable(self) -> NDArray[np.bool_]:
        """Per sequence: not empty and without special tokens (an unknown word is one)."""
        tokens, offsets = self.sequences()
        special = np.isin(tokens, np.fromiter(self._tokenizer.special_ids, np.int64))
        lengths = np.diff(offsets)
        return (lengths > 0) & (count_in_rows(special, offsets) == 0)

    def word_starts(self, word_boundary: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Per sequence: how many words start in it behind its first token; 0 makes it one word."""
        tokens, offsets = self.sequences()
        starts = np.zeros(len(tokens), dtype=bool)
        starts[1:] = (word_boundary[tokens[1:]] & BOUNDARY_BEFORE) | (word_boundary[tokens[:-1]] & BOUNDARY_AFTER) != 0
        lengths = np.diff(offsets)
        starts[offsets[:-1][lengths > 0]] = False
        return count_in_rows(starts, offsets)

    def first_tokens(self) -> NDArray[np.int32]:
        """The first token of every sequence, -1 where it is empty."""
        tokens, offsets = self.sequences()
        first = np.full(len(offsets) - 1, -1, dtype=np.int32)
        filled = np.diff(offsets) > 0
        first[filled] = tokens[offsets[:-1][filled]]
        return first

    def rows(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The chosen sequences one after the other: `tokens` and `offsets` `[len(numbers)+1]`."""
        tokens, offsets = self.sequences()
        index, new_offsets = row_indices(offsets, numbers)
        return tokens[index], new_offsets
