"""Distinct words of a corpus as text, with their counts."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.dictionary.coverage import Words, read_sample, split_words
from megatron_prealign.dictionary.ragged import hash_rows, offsets_of
from megatron_prealign.errors import UserError
from megatron_prealign.tokenizer.base import Tokenizer

# Language -> case-folded word -> occurrences.
WordCounts = Mapping[str, Mapping[str, int]]

_ASCII_WORD = re.compile("[A-Za-z]+")


class DistinctWords(NamedTuple):
    """Distinct token sequences of N running words, in descending frequency; U sequences."""

    first: NDArray[np.int64]
    """Index of the first running word with each sequence `[U]`."""
    occurrences: NDArray[np.int64]
    """Occurrences of each sequence `[U]`."""
    number: NDArray[np.int64]
    """Sequence of every running word `[N]`."""


def token_positions(words: Words) -> NDArray[np.int64]:
    """Position of every token of the running words, word by word `[sum of lengths]`."""
    offsets = offsets_of(words.length)
    return np.arange(offsets[-1]) + np.repeat(words.start - offsets[:-1], words.length)


def distinct_words(tokens: NDArray[Any], words: Words) -> DistinctWords:
    """Groups running words with the same tokens.

    Sequences are compared by 64-bit hash; a collision among a million words happens once in 37 million corpora.
    """
    hashes = hash_rows(tokens[token_positions(words)], offsets_of(words.length))
    _, first, number, count = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -count))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return DistinctWords(first[order], count[order], rank[number])


def word_texts(tokenizer: Tokenizer, tokens: NDArray[Any], words: Words, chosen: NDArray[np.int64]) -> list[str]:
    """Decodes the `chosen` running words, without leading space."""
    bounds = zip(words.start[chosen].tolist(), words.length[chosen].tolist(), strict=True)
    return [tokenizer.decode_word(tokens[start : start + length].tolist()).strip() for start, length in bounds]


class _LettersOnly(dict[int, str]):
    """Table for `str.translate`: keeps letters and combining marks, replaces everything else by a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kept = character if unicodedata.category(character)[0] in "LM" else " "
        self[code] = kept
        return kept


_LETTERS_ONLY = _LettersOnly()


def letter_runs(text: str) -> list[str]:
    """Returns the case-folded runs of letters of `text`, the form in which list and corpus words are compared."""
    return letter_runs_as_written(text.casefold())


def letter_runs_as_written(text: str) -> list[str]:
    """Returns the runs of letters and combining marks of `text`, with their capitals."""
    return _ASCII_WORD.findall(text) if text.isascii() else text.translate(_LETTERS_ONLY).split()


def comparable(text: str) -> str:
    """The runs of letters of a word as one text, in which a word of a table equals its occurrences; empty without
    letters."""
    return " ".join(letter_runs(text))


def count_words(
    prefixes: Sequence[str | Path], tokenizer: Tokenizer, word_boundary: NDArray[np.uint8], max_tokens: int
) -> dict[str, Counter[str]]:
    """Counts the words of preprocessed datasets by language.

    Args:
        word_boundary: `[vocab_size]`, as in `DictionaryTable`.
        max_tokens: number of tokens to sample from each dataset, spread evenly over it.

    Raises:
        UserError: a dataset is missing, corrupt, or preprocessed with another tokenizer.
    """
    counts: dict[str, Counter[str]] = {}
    for prefix in prefixes:
        sidecar = load_sidecar(prefix)
        if sidecar.tokenizer.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"dataset {prefix}: got tokenizer {sidecar.tokenizer.fingerprint}, expected {tokenizer.fingerprint} "
                f"({tokenizer.path}); preprocess the dataset with this tokenizer"
            )
        tokens, row_starts, word_starts = read_sample(prefix, max_tokens, sidecar.segmenter, tokenizer.vocab_size)
        words = split_words(tokens, row_starts, word_boundary, word_starts)
        words = words.take(words.has_letter)
        language = counts.setdefault(sidecar.language, Counter())
        distinct = distinct_words(tokens, words)
        texts = word_texts(tokenizer, tokens, words, distinct.first)
        for text, count in zip(texts, distinct.occurrences.tolist(), strict=True):
            for run in letter_runs(text):
                language[run] += count
    return counts


def occurrences(words: Sequence[str], counts: Mapping[str, int]) -> NDArray[np.int64]:
    """Returns the count of each word `[len(words)]`; a word with several runs of letters has that of the rarest."""
    return np.array([min((counts.get(run, 0) for run in letter_runs(word)), default=0) for word in words], np.int64)
