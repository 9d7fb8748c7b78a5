"""Measures which proportion of a corpus's running words a dictionary covers, and counts the occurrences of its keys.

Code-switching replaces occurrences: its actual rate is its ratio times this coverage.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.indexed import Index, bin_path, check_indexed
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.data.word_bitmap import check_words, words_path
from megatron_prealign.dictionary.ragged import offsets_of
from megatron_prealign.dictionary.table import (
    BOUNDARY_AFTER,
    BOUNDARY_BEFORE,
    HAS_LETTER,
    MAX_KEY_TOKENS,
    DictionaryTable,
)
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import DataSource

DEFAULT_MAX_TOKENS = 5_000_000
# Enough for three digits of a percentage; a blend of many sources must not delay the start of a job.
BLEND_TOKENS = 1_000_000
# 2^32 divided by the golden ratio: any number of multiples modulo 2^32 is evenly spread.
_GOLDEN_FRACTION = 2654435769
_BATCH_DOCUMENTS = 65_536
# Odd multiplier of the token hash; any value works, because every match is checked token by token.
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Coverage:
    """Coverage of one corpus.

    Attributes:
        prefix: prefix of the dataset.
        language: language of the dataset.
        tokens: number of tokens sampled.
        running_words: number of words with a letter in the sample.
        known_words: number of running words with a key in the table.
        key_count: occurrences of every key of the table `[K]`.
    """

    prefix: str
    language: str
    tokens: int
    running_words: int
    known_words: int
    key_count: NDArray[np.int64]

    @property
    def share(self) -> float:
        """Fraction of running words that are known, 0 to 1."""
        return self.known_words / self.running_words if self.running_words else 0.0


class Words(NamedTuple):
    """Running words of a token array: start, length in tokens, and whether the word contains a letter, each `[N]`."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    has_letter: NDArray[np.bool_]

    def take(self, chosen: NDArray[Any]) -> "Words":
        """Returns the chosen words."""
        return Words(self.start[chosen], self.length[chosen], self.has_letter[chosen])


def split_words(
    tokens: NDArray[Any],
    row_starts: NDArray[np.int64],
    word_boundary: NDArray[np.uint8],
    word_starts: NDArray[np.bool_] | None = None,
) -> Words:
    """Splits tokens into words, which start at boundaries before a token or after the previous one, and at row starts.

    Args:
        tokens: ids of all rows, concatenated.
        row_starts: position of the first token of each row.
        word_boundary: `[vocab_size]` as in `DictionaryTable`.
        word_starts: for each token, whether a segmenter marked an additional word start; None without a segmenter.
    """
    flags = word_boundary[tokens]
    starts = (flags & BOUNDARY_BEFORE) != 0
    if word_starts is not None:
        starts |= word_starts
    starts[1:] |= (flags[:-1] & BOUNDARY_AFTER) != 0
    starts[row_starts[row_starts < len(tokens)]] = True
    start = np.flatnonzero(starts)
    if not len(start):
        return Words(start, start.copy(), np.zeros(0, dtype=bool))
    length = np.diff(np.append(start, len(tokens)))
    has_letter = np.logical_or.reduceat((flags & HAS_LETTER) != 0, start)
    return Words(start, length, has_letter)


def _hash(columns: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns one hash per row of ids `[N, length]`."""
    value = np.zeros(len(columns), dtype=np.uint64)
    for column in columns.T:
        value = (value ^ (column.astype(np.uint64) + np.uint64(1))) * _HASH_MULTIPLIER
        value ^= value >> np.uint64(29)
    return value


def match_words(table: DictionaryTable, language_id: int, tokens: NDArray[Any], words: Words) -> NDArray[np.int64]:
    """Returns the key of every word `[N]` in a language, -1 if the table has none."""
    matches = np.full(len(words.start), -1, dtype=np.int64)
    key_length = np.diff(table.key_offsets)
    for length in range(1, MAX_KEY_TOKENS + 1):
        keys = np.flatnonzero((key_length == length) & (table.key_language == language_id))
        candidates = np.flatnonzero(words.length == length)
        if not len(keys) or not len(candidates):
            continue
        within = np.arange(length)
        key_columns = table.key_tokens[table.key_offsets[keys][:, None] + within].astype(np.int64)
        word_columns = tokens[words.start[candidates][:, None] + within].astype(np.int64)
        key_hash = _hash(key_columns)
        order = np.argsort(key_hash, kind="stable")
        key_hash, keys, key_columns = key_hash[order], keys[order], key_columns[order]
        first = np.searchsorted(key_hash, (word_hash := _hash(word_columns)))
        # Keys with equal hashes are adjacent: as many steps as the longest such run reach all of them.
        for step in range(int(np.unique(key_hash, return_counts=True)[1].max())):
            key = np.minimum(first + step, len(keys) - 1)
            same = (key_hash[key] == word_hash) & (key_columns[key] == word_columns).all(axis=1)
            matches[candidates[same]] = keys[key[same]]
    return matches


def measure_coverage(table: DictionaryTable, prefix: str | Path, max_tokens: int = DEFAULT_MAX_TOKENS) -> Coverage:
    """Measures the coverage of `table` on a preprocessed dataset, using the marks of a segmenter if there are any.

    Args:
        max_tokens: maximum number of tokens to sample; documents are spread evenly over a larger dataset.

    Raises:
        UserError: the dataset is missing, corrupt, or preprocessed with another tokenizer.
    """
    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}, expected 1 or more")
    sidecar = load_sidecar(prefix)
    table.check_tokenizer(sidecar.tokenizer.fingerprint, f"dataset {prefix}")
    tokens, row_starts, word_starts = read_sample(prefix, max_tokens, sidecar.segmenter, table.vocab_size)
    words = split_words(tokens, row_starts, table.word_boundary, word_starts)
    language_id = table.language_id(sidecar.language)
    # A language that the table does not have is no error: its coverage is 0.
    keys = match_words(table, -1 if language_id is None else language_id, tokens, words)
    known = (keys >= 0) & words.has_letter
    return Coverage(
        prefix=str(prefix),
        language=sidecar.language,
        tokens=len(tokens),
        running_words=int(words.has_letter.sum()),
        known_words=int(known.sum()),
        key_count=np.bincount(keys[known], minlength=table.num_keys).astype(np.int64),
    )


def blend_coverage(table: DictionaryTable, sources: Sequence[DataSource]) -> dict[str, float]:
    """Measures the coverage per language of a training blend, with sources weighted as in the blend.

    The choice of documents depends only on the datasets: at most `BLEND_TOKENS` per language, divided among its
    sources.

    Args:
        table: table with only the keys to match (`switchable.select_keys`).
        sources: the blend.

    Raises:
        UserError: a dataset is missing, corrupt, or preprocessed with another tokenizer.
    """
    known: defaultdict[str, float] = defaultdict(float)
    weights: defaultdict[str, float] = defaultdict(float)
    counts = Counter(source.language for source in sources)
    for source in sources:
        measured = measure_coverage(table, source.path, max(BLEND_TOKENS // counts[source.language], 1))
        if measured.running_words:
            known[source.language] += source.weight * measured.share
            weights[source.language] += source.weight
    return {language: known[language] / weight for language, weight in weights.items()}


def read_sample(
    prefix: str | Path, max_tokens: int, segmenter: str | None, vocab_size: int
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.bool_] | None]:
    """Samples documents evenly over a dataset; returns their tokens, the start of each document and their word bits.

    Reads the files directly: Megatron-Core's reader would import torch, which takes longer than most measurements.

    Raises:
        UserError: the dataset is corrupt, or has an id that is not below `vocab_size`.
    """
    index = check_indexed(prefix)
    return read_documents(prefix, index, _draw(index.lengths, max_tokens), max_tokens, segmenter, vocab_size)


def read_documents(
    prefix: str | Path,
    index: Index,
    documents: NDArray[np.int64],
    max_tokens: int,
    segmenter: str | None,
    vocab_size: int,
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.bool_] | None]:
    """Reads the first `max_tokens` tokens of some documents of a dataset; returns what `read_sample` returns.

    Args:
        index: index of the dataset.
        documents: integers `[N]`, at least one.

    Raises:
        UserError: the dataset has an id that is not below `vocab_size`, or no marks of its segmenter.
    """
    lengths = index.lengths
    tokens = np.memmap(bin_path(prefix), index.dtype, "r")
    first = np.asarray(index.pointers)[documents] // index.dtype.itemsize
    spans = list(zip(first.tolist(), (first + lengths[documents]).tolist(), strict=True))
    starts = offsets_of(lengths[documents])[:-1]
    bits = None
    if segmenter is not None:
        check_words(prefix, index.tokens, segmenter)
        marks = np.memmap(words_path(prefix), np.uint8, "r")
        bits = np.concatenate([_bits(marks, begin, end) for begin, end in spans])[:max_tokens]
    # Only the last document is truncated, and a single document can be longer than the limit.
    drawn = np.concatenate([tokens[begin:end] for begin, end in spans])[:max_tokens]
    if len(drawn) and int(drawn.max()) >= vocab_size:
        raise UserError(
            f"{prefix}.bin: got token id {int(drawn.max())}, expected ids below the vocabulary size {vocab_size}; "
            "preprocess the dataset again with megatron-prealign preprocess"
        )
    return drawn, starts, bits


def _bits(marks: NDArray[np.uint8], begin: int, end: int) -> NDArray[np.bool_]:
    """Returns bits `begin` to `end` of a bitmap whose bytes have the lowest bit first."""
    skipped = begin % 8
    part = np.asarray(marks[begin // 8 : -(-end // 8)])
    return np.unpackbits(part, count=skipped + end - begin, bitorder="little")[skipped:].view(np.bool_)


def _draw(lengths: NDArray[np.integer], max_tokens: int) -> NDArray[np.int64]:
    """Draws documents, in ascending order, until they have at least `max_tokens` tokens; all if there are fewer.

    Documents are drawn in steps of the golden fraction of the corpus, modulo its size, so any number of them is evenly
    spread. Only integers are used, so the same corpus gives the same documents with any library version.
    """
    count = len(lengths)
    if int(np.sum(lengths, dtype=np.int64)) <= max_tokens:
        return np.arange(count)
    step = max(count * _GOLDEN_FRACTION >> 32, 1)
    # With a common divisor the steps would return to the first document before visiting all of them.
    while math.gcd(step, count) > 1:
        step += 1
    drawn: list[NDArray[np.int64]] = []
    tokens = 0
    for first in range(0, count, _BATCH_DOCUMENTS):
        documents = np.arange(first, min(first + _BATCH_DOCUMENTS, count)) * step % count
        total = tokens + np.cumsum(lengths[documents], dtype=np.int64)
        taken = int(np.searchsorted(total, max_tokens)) + 1
        drawn.append(documents[:taken])
        if taken <= len(documents):
            break
        tokens = int(total[-1])
    return np.sort(np.concatenate(drawn))


def count_groups(table: DictionaryTable, corpora: Sequence[Coverage]) -> DictionaryTable:
    """Returns the table with `group_count` set to the occurrences of each group's source word, in any case."""
    counts = np.zeros(table.num_groups, dtype=np.int64)
    for corpus in corpora:
        np.add.at(counts, table.key_group, corpus.key_count)
    return replace(table, group_count=counts)
