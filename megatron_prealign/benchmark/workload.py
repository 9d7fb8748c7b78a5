"""Workloads for the code-switching benchmark: a dictionary table and a text, synthetic or user-defined.

The synthetic ones are built from a seed with vectorised operations, so a million keys take seconds. They imitate what
determines the speed: the lengths of words, how often words repeat, and how many of them are in the table.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.errors import UserError

VOCABULARY = 50_000
EOD = 0
LANGUAGES = 5
"""Language 0 is the language of the text, the others are those of the translations."""
# Token ids from _FIRST_START start a word, ids from _FIRST_INNER continue one, ids from _FIRST_MARK are punctuation.
# Start tokens from _FIRST_UNKNOWN are never a key of one token.
_FIRST_START, _FIRST_UNKNOWN, _FIRST_INNER, _FIRST_MARK = 1, 20_000, 30_000, 49_000
_START, _INNER, _MARK, _END = 1 | 4, 4, 1, 1 | 2
LENGTH_FRACTIONS = (0.3, 0.4, 0.2, 0.1)
"""Fractions of words of one to four tokens among the running words; also among the keys, unless the vocabulary has too
few words of one token."""
COVERAGE = 0.9
"""Fraction of the running words that are in the table."""
_MARK_FRACTION, _END_FRACTION = 0.08, 0.001
_MAX_CANDIDATES, _MAX_TRANSLATION_TOKENS = 4, 3
MAX_KEYS = 10_000_000
"""With 2.5 candidates per key on average, this stays below the limit of 2^25 of a device table."""
# Zipf-Mandelbrot law; the shift flattens the first ranks.
_ZIPF_SHIFT = 2.7


@dataclass(frozen=True)
class Workload:
    """A table and a text."""

    name: str
    """`synthetic`, or the prefix of the dataset."""
    arrays: dict[str, Any]
    """Arguments of `build_ngram_table` except the device."""
    eod_id: int
    language: int
    """Index of the text's language in the table."""
    read: Callable[[int], tuple[NDArray[np.int64], NDArray[np.bool_] | None]]
    """Returns the first n tokens of the text (int64 [n]) and additional word starts (bool [n], or None)."""
    available: int | None = None
    """Number of tokens in the text; None if unlimited."""

    def check_length(self, rows: int, sequence: int, lookahead: int) -> None:
        """Checks that the text is long enough for `rows`.

        Raises:
            UserError: the text is too short.
        """
        needed = rows * sequence + 1 + lookahead
        if self.available is not None and self.available < needed:
            raise UserError(
                f"{self.name} has {self.available:,} tokens, expected at least {needed:,} for the case "
                f"{rows}x{sequence}; use a larger dataset or smaller --cases"
            )

    def rows(self, count: int, sequence: int, lookahead: int) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        """Reads rows as in training: every `sequence` tokens of the text, with one more token and the lookahead.

        Returns:
            Tokens (int64 [count, sequence + 1 + lookahead]) and word starts (bool, the same shape, or None).
        """
        tokens, starts = self.read(count * sequence + 1 + lookahead)
        index = sequence * np.arange(count)[:, None] + np.arange(sequence + 1 + lookahead)
        return tokens[index], None if starts is None else starts[index]


def synthetic_workload(keys: int, seed: int) -> Workload:
    """Builds a table of `keys` words and a text of which it covers about `COVERAGE` of the running words.

    Raises:
        UserError: `keys` is out of range.
    """
    if not 1 <= keys <= MAX_KEYS:
        raise UserError(f"--keys is {keys}, expected 1 to {MAX_KEYS}")
    random = np.random.default_rng([seed, keys])
    tokens, offsets = _make_keys(keys, random)
    arrays = {
        "word_boundary": _word_boundary(),
        "key_tokens": tokens,
        "key_offsets": offsets,
        "key_language": np.zeros(keys, dtype=np.int16),
        **_make_candidates(keys, random),
        "language_weights": [0.0, *[1.0] * (LANGUAGES - 1)],
        "forbidden_tokens": [EOD],
    }
    text_seed = int(random.integers(1 << 62))
    return Workload("synthetic", arrays, EOD, 0, lambda count: (_make_text(tokens, offsets, count, text_seed), None))


def _word_boundary() -> NDArray[np.uint8]:
    flags = np.full(VOCABULARY, _START, dtype=np.uint8)
    flags[EOD] = _END
    flags[_FIRST_INNER:_FIRST_MARK] = _INNER
    flags[_FIRST_MARK:] = _MARK
    return flags


def _ragged(columns: NDArray[np.int64], lengths: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Cuts the rows of `columns` [N, max length] to `lengths` and concatenates them; also returns offsets [N+1]."""
    kept = columns[np.arange(columns.shape[1]) < lengths[:, None]]
    return kept.astype(np.int32), np.append(0, np.cumsum(lengths))


def _random_words(count: int, length: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Draws words of `length` tokens [count, length]: one that starts a word, then ones that continue it."""
    words = random.integers(_FIRST_INNER, _FIRST_MARK, (count, length))
    words[:, 0] = random.integers(_FIRST_START, _FIRST_INNER, count)
    return words


def _make_keys(keys: int, random: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Draws distinct words in random order, so that frequent ones are not adjacent in memory."""
    single = min(round(LENGTH_FRACTIONS[0] * keys), _FIRST_UNKNOWN - _FIRST_START)
    longer = np.array(LENGTH_FRACTIONS[1:]) / sum(LENGTH_FRACTIONS[1:])
    counts = [single, *np.round(longer * (keys - single)).astype(int)]
    counts[1] += keys - sum(counts)
    max_length = len(LENGTH_FRACTIONS)
    words, lengths = np.zeros((keys, max_length), dtype=np.int64), np.repeat(np.arange(1, max_length + 1), counts)
    done = 0
    for length, count in enumerate(counts, start=1):
        words[done : done + count, :length] = _distinct_words(count, length, random)
        done += count
    order = random.permutation(keys)
    return _ragged(words[order], lengths[order])


def _distinct_words(count: int, length: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Draws `count` distinct words of `length` tokens."""
    if length == 1:
        return random.permutation(np.arange(_FIRST_START, _FIRST_UNKNOWN))[:count, None]
    # Only one word in thousands is drawn twice, so drawing twice as many is more than enough.
    powers = np.int64(VOCABULARY) ** np.arange(length)
    codes = random.permutation(np.unique(_random_words(2 * count + 8, length, random) @ powers))[:count]
    return codes[:, None] // powers % VOCABULARY


def _make_candidates(keys: int, random: np.random.Generator) -> dict[str, NDArray[Any]]:
    per_key = random.integers(1, _MAX_CANDIDATES + 1, keys)
    owner = np.repeat(np.arange(keys), per_key)
    language = random.integers(1, LANGUAGES, len(owner))
    words = _random_words(len(owner), _MAX_TRANSLATION_TOKENS, random)
    tokens, offsets = _ragged(words, random.integers(1, _MAX_TRANSLATION_TOKENS + 1, len(owner)))
    return {
        "key_candidate_offsets": np.append(0, np.cumsum(per_key)),
        "candidate_tokens": tokens,
        "candidate_offsets": offsets,
        # Sorted by language within a key, as in a table file.
        "candidate_language": language[np.lexsort((language, owner))].astype(np.int16),
        "candidate_weight": np.ones(len(owner), dtype=np.float32),
    }


def _make_text(
    key_tokens: NDArray[np.int32], key_offsets: NDArray[np.int64], count: int, seed: int
) -> NDArray[np.int64]:
    """Draws a text of `count` tokens: word lengths by `LENGTH_FRACTIONS`, keys of each length by Zipf's law."""
    random = np.random.default_rng(seed)
    max_length = len(LENGTH_FRACTIONS)
    lengths = 1 + random.choice(max_length, count, p=LENGTH_FRACTIONS)
    words = _random_words(count, max_length, random)
    single = lengths == 1
    words[single, 0] = random.integers(_FIRST_UNKNOWN, _FIRST_INNER, int(single.sum()))
    known = random.random(count) < COVERAGE
    key_lengths = np.diff(key_offsets)
    for length in range(1, max_length + 1):
        keys, places = np.flatnonzero(key_lengths == length), np.flatnonzero(known & (lengths == length))
        if len(keys):
            drawn = keys[_zipf(len(keys), len(places), random)]
            words[places, :length] = key_tokens[key_offsets[drawn][:, None] + np.arange(length)]
    kind = random.random(count)
    mark = kind < _MARK_FRACTION + _END_FRACTION
    words[mark, 0] = random.integers(_FIRST_MARK, VOCABULARY, int(mark.sum()))
    words[kind < _END_FRACTION, 0] = EOD
    lengths[mark] = 1
    return _ragged(words, lengths)[0][:count].astype(np.int64)


def _zipf(ranks: int, count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Draws `count` ranks from 0 to ranks - 1."""
    cumulative = np.cumsum(1.0 / (np.arange(ranks) + 1 + _ZIPF_SHIFT))
    return np.searchsorted(cumulative, random.random(count) * cumulative[-1], side="right").clip(max=ranks - 1)


def dataset_workload(table_path: str, prefix: str) -> Workload:
    """Opens a table file and a preprocessed dataset.

    Raises:
        UserError: a file is missing or corrupt, the tokenizers differ, or the table has no words of the dataset's
            language.
    """
    from megatron_prealign.data.indexed import bin_path, open_indexed
    from megatron_prealign.data.sidecar import load_sidecar
    from megatron_prealign.data.word_bitmap import check_words, words_path
    from megatron_prealign.dictionary.table import load_table

    table, sidecar, dataset = load_table(table_path), load_sidecar(prefix), open_indexed(prefix)
    table.check_tokenizer(sidecar.tokenizer.fingerprint, owner=prefix)
    language = table.language_id(sidecar.language)
    if language is None or not (table.key_language == language).any():
        raise UserError(
            f"{table_path} has no words of {sidecar.language}, the language of {prefix}; use a table with that language"
        )
    total = int(dataset.sequence_lengths.sum(dtype=np.int64))
    if sidecar.segmenter is not None:
        check_words(prefix, total, sidecar.segmenter)

    def read(count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
        tokens = np.memmap(bin_path(prefix), dataset.index.dtype, "r")[:count].astype(np.int64)
        if sidecar.segmenter is None:
            return tokens, None
        packed = np.memmap(words_path(prefix), np.uint8, "r")[: -(-count // 8)]
        return tokens, np.unpackbits(np.asarray(packed), count=count, bitorder="little").view(np.bool_)

    names = (
        "word_boundary",
        "key_tokens",
        "key_offsets",
        "key_language",
        "key_candidate_offsets",
        "candidate_tokens",
        "candidate_offsets",
        "candidate_language",
        "candidate_weight",
    )
    arrays = {name: getattr(table, name) for name in names}
    arrays |= {"language_weights": [1.0] * len(table.languages), "forbidden_tokens": [sidecar.eod_id]}
    return Workload(prefix, arrays, sidecar.eod_id, language, read, total)
