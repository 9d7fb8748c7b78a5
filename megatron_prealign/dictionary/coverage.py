"""How much of a corpus a dictionary knows, in running words, and how often each word of it occurs.

Code-switching replaces occurrences: its true rate is its ratio times the coverage measured here.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.indexed import bin_path, check_indexed
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
# Enough for three digits of a share; a blend of many sources must not make the start of a job long.
BLEND_TOKENS = 1_000_000
# 2^32 divided by the golden ratio: multiples of this part of a whole lie evenly spread in it, however many one takes.
_GOLDEN_PART = 2654435769
_DOCUMENTS_AT_ONCE = 65_536
# Odd multiplier of the token hash; any works, as every match is checked token by token.
_HASH_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Coverage:
    """What one corpus showed.

    Attributes:
        prefix: the dataset.
        language: its language.
        tokens: tokens looked at.
        running_words: words with a letter among them.
        known_words: those of them the table has a key for.
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
        """Known running words by all running words, 0 to 1."""
        return self.known_words / self.running_words if self.running_words else 0.0


class Words(NamedTuple):
    """Running words of a token row: where each starts, its length in tokens, and whether it contains a letter `[N]`."""

    start: NDArray[np.int64]
    length: NDArray[np.int64]
    has_letter: NDArray[np.bool_]

    def take(self, chosen: NDArray[Any]) -> "Words":
        """The chosen words."""
        return Words(self.start[chosen], self.length[chosen], self.has_letter[chosen])


def split_words(
    tokens: NDArray[Any],
    row_starts: NDArray[np.int64],
    word_boundary: NDArray[np.uint8],
    word_starts: NDArray[np.bool_] | None = None,
) -> Words:
    """Splits tokens into words: a word starts where the token says so, where the one before says so, and with each row.

    Args:
        tokens: ids of all rows, one row after the other.
        row_starts: position of the first token of each row.
        word_boundary: `[vocab_size]` as in `DictionaryTable`.
        word_starts: for each token whether a segmenter says that a word starts there, too; None without one.
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
    """One number per row of ids `[N, length]`."""
    value = np.zeros(len(columns), dtype=np.uint64)
    for column in columns.T:
        value = (value ^ (column.astype(np.uint64) + np.uint64(1))) * _HASH_MULTIPLIER
        value ^= value >> np.uint64(29)
    return value


def match_words(table: DictionaryTable, language_id: int, tokens: NDArray[Any], words: Words) -> NDArray[np.int64]:
    """The key of every word `[N]` in a language, -1 where the table has none."""
    found = np.full(len(words.start), -1, dtype=np.int64)
    key_length = np.diff(table.key_offsets)
    for length in range(1, MAX_KEY_TOKENS + 1):
        keys = np.flatnonzero((key_length == length) & (table.key_language == language_id))
        places = np.flatnonzero(words.length == length)
        if not len(keys) or not len(places):
            continue
        within = np.arange(length)
        key_columns = table.key_tokens[table.key_offsets[keys][:, None] + within].astype(np.int64)
        word_columns = tokens[words.start[places][:, None] + within].astype(np.int64)
        key_hash = _hash(key_columns)
        order = np.argsort(key_hash, kind="stable")
        key_hash, keys, key_columns = key_hash[order], keys[order], key_columns[order]
        place = np.searchsorted(key_hash, (word_hash := _hash(word_columns)))
        # Keys that share a hash lie side by side: as many steps as the longest such run reach every one of them.
        for step in range(int(np.unique(key_hash, return_counts=True)[1].max())):
            candidate = np.minimum(place + step, len(keys) - 1)
            same = (key_hash[candidate] == word_hash) & (key_columns[candidate] == word_columns).all(axis=1)
            found[places[same]] = keys[candidate[same]]
    return found


def measure_coverage(table: DictionaryTable, prefix: str | Path, max_tokens: int = DEFAULT_MAX_TOKENS) -> Coverage:
    """Looks for the keys of `table` in a dataset made by `preprocess`; where a segmenter marked words, in those words.

    Args:
        max_tokens: at most so many tokens are looked at; documents are drawn from all over a larger dataset.

    Raises:
        UserError: a missing or damaged dataset, or one made with another tokenizer.
    """
    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}, expected 1 or more")
    sidecar = load_sidecar(prefix)
    table.check_tokenizer(sidecar.tokenizer.fingerprint, f"dataset {prefix}")
    tokens, row_starts, word_starts = read_sample(prefix, max_tokens, sidecar.segmenter, table.vocab_size)
    words = split_words(tokens, row_starts, table.word_boundary, word_starts)
    language_id = table.language_id(sidecar.language)
    # A language the table does not have: nothing is known, which is an answer and no mistake.
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


def blend_coverage(
    table: DictionaryTable, sources: Sequence[DataSource], max_tokens: int = BLEND_TOKENS
) -> dict[str, float]:
    """Share of running words that `table` knows, per language of a training blend, sources weighted as in the blend.

    Which documents are looked at depends on the datasets alone.

    Args:
        table: with the keys alone that are to be found (`switchable.select_keys`).
        sources: the blend.
        max_tokens: tokens to look at per language, shared by its sources.

    Raises:
        UserError: a dataset is missing or damaged, or made with another tokenizer.
    """
    known: defaultdict[str, float] = defaultdict(float)
    weights: defaultdict[str, float] = defaultdict(float)
    counts = Counter(source.language for source in sources)
    for source in sources:
        measured = measure_coverage(table, source.path, max(max_tokens // counts[source.language], 1))
        if measured.running_words:
            known[source.language] += source.weight * measured.share
            weights[source.language] += source.weight
    return {language: known[language] / weight for language, weight in weights.items()}


def read_sample(
    prefix: str | Path, max_tokens: int, segmenter: str | None, vocab_size: int
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.bool_] | None]:
    """Tokens of documents drawn from all over the dataset, where each document starts among them, and their bits.

    Reads the files itself: Megatron-Core's reader would import torch, which takes longer than most measurements.

    Raises:
        UserError: a damaged dataset, or an id that is not below `vocab_size`.
    """
    index = check_indexed(prefix)
    lengths = index.lengths
    documents = _draw(lengths, max_tokens)
    tokens = np.memmap(bin_path(prefix), index.dtype, "r")
    first = np.asarray(index.pointers)[documents] // index.dtype.itemsize
    spans = list(zip(first.tolist(), (first + lengths[documents]).tolist(), strict=True))
    starts = offsets_of(lengths[documents])[:-1]
    bits = None
    if segmenter is not None:
        check_words(prefix, index.tokens, segmenter)
        marks = np.memmap(words_path(prefix), np.uint8, "r")
        bits = np.concatenate([_bits(marks, begin, end) for begin, end in spans])[:max_tokens]
    # Only the last document drawn is cut, and one document of the whole corpus may be longer than the limit.
    drawn = np.concatenate([tokens[begin:end] for begin, end in spans])[:max_tokens]
    if len(drawn) and int(drawn.max()) >= vocab_size:
        raise UserError(
            f"{prefix}.bin: token id {int(drawn.max())}, expected ids below the vocabulary's {vocab_size}; "
            "make the dataset again with megatron-prealign preprocess"
        )
    return drawn, starts, bits


def _bits(marks: NDArray[np.uint8], begin: int, end: int) -> NDArray[np.bool_]:
    """Bits `begin` to `end` of a bitmap whose bytes have the lowest bit first."""
    skipped = begin % 8
    part = np.asarray(marks[begin // 8 : -(-end // 8)])
    return np.unpackbits(part, count=skipped + end - begin, bitorder="little")[skipped:].view(np.bool_)


def _draw(lengths: NDArray[np.integer], max_tokens: int) -> NDArray[np.int64]:
    """Documents that hold `max_tokens` tokens together or just more, in ascending order; all if they hold fewer.

    They follow each other in steps of the golden part of the corpus, round its end: evenly spread however many it
    takes, in integers alone, so that the same corpus gives the same numbers with any version of anything.
    """
    number = len(lengths)
    if int(np.sum(lengths, dtype=np.int64)) <= max_tokens:
        return np.arange(number)
    step = max(number * _GOLDEN_PART >> 32, 1)
    # With a common divisor it would come back to the first document before it has been at all of them.
    while math.gcd(step, number) > 1:
        step += 1
    drawn: list[NDArray[np.int64]] = []
    tokens = 0
    for first in range(0, number, _DOCUMENTS_AT_ONCE):
        documents = np.arange(first, min(first + _DOCUMENTS_AT_ONCE, number)) * step % number
        so_far = tokens + np.cumsum(lengths[documents], dtype=np.int64)
        taken = int(np.searchsorted(so_far, max_tokens)) + 1
        drawn.append(documents[:taken])
        if taken <= len(documents):
            break
        tokens = int(so_far[-1])
    return np.sort(np.concatenate(drawn))


def count_groups(table: DictionaryTable, corpora: Sequence[Coverage]) -> DictionaryTable:
    """The table with `group_count` filled: occurrences of each group's source word, in any spelling, in all corpora."""
    counts = np.zeros(table.num_groups, dtype=np.int64)
    for corpus in corpora:
        np.add.at(counts, table.key_group, corpus.key_count)
    return replace(table, group_count=counts)
