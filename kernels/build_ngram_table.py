"""Builds the device table and validates all ranges once, so that no training step has to."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_prealign.kernels.ngram_table import (
    COLUMNS_SHIFT,
    DRAW_BIAS,
    HAS_LETTER,
    LANGUAGE_SHIFT,
    LENGTH_SHIFT,
    MAX_CANDIDATE_TOKENS,
    MAX_LANGUAGES,
    MAX_NGRAM,
    TARGET_SHIFT,
    TOKEN_BITS,
    NgramTable,
    hash_columns,
    hash_slots,
    lookup,
)

_GOLDEN = 0x9E3779B97F4A7C15
_ALL_64 = (1 << 64) - 1
_SALTS = 32
_INSERT_ROUNDS = 1000
# Load factor 0.42; cuckoo hashing with two slots per key fails at 0.5.
_SLOTS_PER_KEY = 2.4


def build_ngram_table(
    *,
    word_boundary: NDArray[np.uint8],
    key_tokens: NDArray[np.int32],
    key_offsets: NDArray[np.int64],
    key_language: NDArray[np.int16],
    key_candidate_offsets: NDArray[np.int64],
    candidate_tokens: NDArray[np.int32],
    candidate_offsets: NDArray[np.int64],
    candidate_language: NDArray[np.int16],
    candidate_weight: NDArray[np.float32],
    language_weights: Sequence[float] | NDArray[np.float64],
    forbidden_tokens: Sequence[int] = (),
    device: torch.device | str = "cpu",
) -> NgramTable:
    """Builds the device table of a run.

    A draw selects a target language by its weight among those of the key, then a candidate by its weight within it.

    Args:
        word_boundary: [vocabulary], see `NgramTable`.
        key_tokens: tokens of all keys; key k is key_tokens[key_offsets[k]:key_offsets[k+1]], 1 to 8 tokens.
        key_offsets: [K+1].
        key_language: [K], source language.
        key_candidate_offsets: [K+1], candidates of each key.
        candidate_tokens: tokens of all candidates.
        candidate_offsets: [C+1].
        candidate_language: [C], target language.
        candidate_weight: [C], at least 0; a candidate of weight 0 is never drawn.
        language_weights: [L], weight of each target language in the draw, 0 for never. Its length is the number of
            languages. Keys without a drawable candidate are dropped.
        forbidden_tokens: special tokens (end of document, padding) that no key and no candidate may contain.
        device: device of the tensors.

    Raises:
        ValueError: the arrays are inconsistent or exceed the limits above, or no key has a drawable candidate.
    """
    weights = np.asarray(language_weights, dtype=np.float64)
    _check_keys(word_boundary, key_tokens, key_offsets, key_language, len(weights), forbidden_tokens)
    candidates = (key_candidate_offsets, candidate_tokens, candidate_offsets, candidate_language, candidate_weight)
    _check_candidates(len(word_boundary), len(key_language), *candidates, weights, forbidden_tokens)
    owner = np.repeat(np.arange(len(key_language)), np.diff(key_candidate_offsets))
    drawable = np.flatnonzero((candidate_weight > 0) & (weights[candidate_language] > 0))
    if not len(drawable):
        raise ValueError(
            f"key_tokens has {len(key_language)} keys, expected at least one with a candidate whose weight and whose "
            "language's weight are above 0"
        )
    keys, owner, counts = np.unique(owner[drawable], return_inverse=True, return_counts=True)
    target = candidate_language[drawable].astype(np.int64)
    key_candidates = np.append(0, np.cumsum(counts))
    probabilities = _probabilities(owner, target, candidate_weight[drawable].astype(np.float64), weights)
    first, more, pairs, columns = _pack_keys(key_tokens, key_offsets, key_language, keys)
    lengths = np.diff(candidate_offsets)[drawable]
    packed = candidate_offsets[:-1][drawable] | (lengths << LENGTH_SHIFT) | (target << TARGET_SHIFT)

    def tensor(values: NDArray, dtype: torch.dtype, *sentinel: int) -> Tensor:
        return torch.from_numpy(np.append(values, sentinel).astype(np.int64)).to(dtype)

    table = NgramTable(
        word_boundary=torch.from_numpy(np.array(word_boundary, dtype=np.uint8)),
        slots=torch.empty(0, dtype=torch.int64),
        key_first=tensor(first, torch.int64, -1),
        key_more=tensor(more, torch.int32, 0),
        pairs=tensor(pairs, torch.int64),
        key_candidates=tensor(key_candidates, torch.int32, len(drawable) + 1),
        candidate_last=tensor(_bounds(probabilities, key_candidates) - 1 - DRAW_BIAS, torch.int32, DRAW_BIAS - 1),
        candidates=tensor(packed, torch.int64, 1 << LENGTH_SHIFT),
        candidate_tokens=tensor(candidate_tokens, torch.int32),
        multipliers=(1,) * len(columns),
        draw_steps=int(counts.max(initial=1) - 1).bit_length(),
        num_keys=len(keys),
        num_languages=len(weights),
        counts_letters=bool(np.any(word_boundary & HAS_LETTER)),
        forbidden_tokens=frozenset(int(token) for token in forbidden_tokens),
    )
    return to_device(_fill_slots(table, [torch.from_numpy(column) for column in columns]), device)


def to_device(table: NgramTable, device: torch.device | str) -> NgramTable:
    """Copies the table with all its tensors to `device`."""
    moved = {name: each.to(device) for name, each in table._asdict().items() if isinstance(each, Tensor)}
    return table._replace(**moved)


def _check_offsets(name: str, offsets: NDArray, count: int, total: int, least: int, most: int) -> None:
    if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != total:
        ends = (int(offsets[0]), int(offsets[-1])) if len(offsets) else ()
        raise ValueError(
            f"{name} has {len(offsets)} items with first and last {ends}, expected {count + 1} items from 0 to {total}"
        )
    lengths = np.diff(offsets)
    wrong = np.flatnonzero((lengths < least) | (lengths > most))
    if len(wrong):
        raise ValueError(f"{name}: item {wrong[0]} has length {lengths[wrong[0]]}, expected {least} to {most}")


def _check_ids(name: str, ids: NDArray, limit: int) -> None:
    wrong = np.flatnonzero((ids < 0) | (ids >= limit))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}] is {ids[wrong[0]]}, expected 0 to {limit - 1}")


def _check_allowed(name: str, tokens: NDArray, forbidden: Sequence[int]) -> None:
    wrong = np.flatnonzero(np.isin(tokens, np.asarray(forbidden, dtype=np.int64)))
    if len(wrong):
        raise ValueError(f"{name}[{wrong[0]}] is the special token {tokens[wrong[0]]}, which words must not contain")


def _check_keys(
    word_boundary: NDArray,
    key_tokens: NDArray,
    key_offsets: NDArray,
    key_language: NDArray,
    num_languages: int,
    forbidden: Sequence[int],
) -> None:
    vocabulary = len(word_boundary)
    if vocabulary >= 1 << TOKEN_BITS:
        raise ValueError(f"word_boundary has {vocabulary} items, expected fewer than {1 << TOKEN_BITS}")
    if not 0 < num_languages <= MAX_LANGUAGES:
        raise ValueError(f"language_weights has {num_languages} items, expected 1 to {MAX_LANGUAGES}")
    _check_offsets("key_offsets", key_offsets, len(key_language), len(key_tokens), 1, MAX_NGRAM)
    _check_ids("key_tokens", key_tokens, vocabulary)
    _check_ids("key_language", key_language, num_languages)
    _check_allowed("key_tokens", key_tokens, forbidden)


def _check_candidates(
    vocabulary: int,
    keys: int,
    key_candidate_offsets: NDArray,
    candidate_tokens: NDArray,
    candidate_offsets: NDArray,
    candidate_language: NDArray,
    candidate_weight: NDArray,
    language_weights: NDArray,
    forbidden: Sequence[int],
) -> None:
    count = len(candidate_language)
    if len(candidate_weight) != count:
        raise ValueError(f"candidate_weight has {len(candidate_weight)} items, expected {count}")
    # the kernel stores the candidate's index plus one in the lower 25 bits of a position's decision
    if count >= (1 << 25) - 1:
        raise ValueError(f"candidate_language has {count} items, expected fewer than {(1 << 25) - 1}")
    if len(candidate_tokens) >= 1 << 31:
        raise ValueError(f"candidate_tokens has {len(candidate_tokens)} items, expected fewer than {1 << 31}")
    _check_offsets("key_candidate_offsets", key_candidate_offsets, keys, count, 0, count)
    _check_offsets("candidate_offsets", candidate_offsets, count, len(candidate_tokens), 1, MAX_CANDIDATE_TOKENS)
    _check_ids("candidate_tokens", candidate_tokens, vocabulary)
    _check_ids("candidate_language", candidate_language, len(language_weights))
    _check_allowed("candidate_tokens", candidate_tokens, forbidden)
    for name, values in (("candidate_weight", candidate_weight), ("language_weights", language_weights)):
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(wrong):
            raise ValueError(f"{name}[{wrong[0]}] is {values[wrong[0]]}, expected a finite number of at least 0")


def _probabilities(
    owner: NDArray[np.int64],
    target: NDArray[np.int64],
    candidate_weight: NDArray[np.float64],
    language_weights: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Probability of every candidate of a key: that of its language times its own within the language."""
    languages = len(language_weights)
    entries, entry = np.unique(owner * languages + target, return_inverse=True)
    within = candidate_weight / np.bincount(entry, weights=candidate_weight)[entry]
    weight = language_weights[entries % languages]
    total = np.bincount(entries // languages, weights=weight)
    return (weight / total[entries // languages])[entry] * within


def _bounds(probabilities: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cumulative probabilities of every list, scaled so that the last is exactly 2^32 and none is below 1."""
    counts = np.diff(offsets)
    # per list: one cumulative sum over all would lose precision for lists far down the array
    running = np.zeros(len(counts))
    prefix = np.empty(len(probabilities))
    for rank in range(int(counts.max(initial=0))):
        longer = np.flatnonzero(counts > rank)
        running[longer] += probabilities[offsets[longer] + rank]
        prefix[offsets[longer] + rank] = running[longer]
    bounds = np.floor(prefix * 2.0**32 + 0.5).astype(np.int64).clip(1, 1 << 32)
    bounds[offsets[1:] - 1] = 1 << 32
    return bounds


def _pack_keys(
    key_tokens: NDArray, key_offsets: NDArray, key_language: NDArray, keys: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """First columns, start of the other columns, the other columns, and all columns as [columns, len(keys)]."""
    lengths = np.diff(key_offsets)[keys]
    extra = (lengths + 1) // 2 - 1
    columns = np.zeros((int(extra.max(initial=0)) + 1, len(keys)), dtype=np.int64)
    for position in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > position)
        token = key_tokens[key_offsets[keys[longer]] + position].astype(np.int64) + 1
        columns[position // 2, longer] |= token << (TOKEN_BITS * (position % 2))
    columns[0] |= (extra << COLUMNS_SHIFT) | (key_language[keys].astype(np.int64) << LANGUAGE_SHIFT)
    more = np.where(extra > 0, np.cumsum(extra) - extra + 1, 0)
    pairs = np.zeros(int(extra.sum()) + 1, dtype=np.int64)
    for column in range(1, len(columns)):
        longer = np.flatnonzero(extra >= column)
        pairs[more[longer] + column - 1] = columns[column, longer]
    return columns[0], more, pairs, columns


def _multipliers(salt: int, columns: int) -> tuple[int, ...]:
    """Odd 64-bit factors from a salt (the splitmix64 sequence), as signed integers."""
    factors = []
    for index in range(columns):
        mixed = ((salt * MAX_NGRAM + index + 1) * _GOLDEN) & _ALL_64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _ALL_64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _ALL_64
        mixed = (mixed ^ (mixed >> 31)) | 1
        factors.append(mixed - (1 << 64) if mixed >> 63 else mixed)
    return tuple(factors)


def _fill_slots(table: NgramTable, columns: Sequence[Tensor]) -> NgramTable:
    """The table with slots: searches a salt for which every key has a slot and is found by a lookup."""
    count = len(columns[0])
    _check_distinct(columns)
    slots = max(4, round(_SLOTS_PER_KEY * count))
    for salt in range(_SALTS):
        multipliers = _multipliers(salt, len(columns))
        first, second, fingerprint = hash_slots(hash_columns(columns, multipliers), slots)
        owner = _insert(first.numpy(), second.numpy(), slots)
        if owner is None:
            continue
        fingerprints = np.append(fingerprint.numpy(), 0)[owner]
        # << 32 moves the fingerprint's top bit into the sign, which the lookup masks off again
        filled = table._replace(slots=torch.from_numpy((fingerprints << 32) | owner), multipliers=multipliers)
        key, found = lookup(filled, columns)
        if bool(found.all()) and torch.equal(key, torch.arange(count)):
            return filled
    raise ValueError(f"cannot place {count} keys in {slots} slots with any of {_SALTS} salts")


def _check_distinct(columns: Sequence[Tensor]) -> None:
    order = np.lexsort([column.numpy() for column in columns])
    same = np.ones(max(len(order) - 1, 0), dtype=bool)
    for column in columns:
        same &= np.diff(column.numpy()[order]) == 0
    if same.any():
        raise ValueError("key_tokens has duplicate keys: two keys have the same language and the same tokens")


def _insert(first: NDArray[np.int64], second: NDArray[np.int64], slots: int) -> NDArray[np.int64] | None:
    """Key of every slot (len(first) = empty), or None if some key gets no slot. Inserts all keys at once, in rounds."""
    count = len(first)
    both = np.stack([first, second])
    owner = np.full(slots, count, dtype=np.int64)
    choice = np.zeros(count, dtype=np.int64)
    pending = np.arange(count)
    for _ in range(_INSERT_ROUNDS):
        wanted = both[choice[pending], pending]
        evicted = owner[wanted]
        owner[wanted] = pending
        inserted = owner[wanted] == pending
        evicted = evicted[inserted]
        pending = np.concatenate([pending[~inserted], evicted[evicted < count]])
        if len(pending) == 0:
            return owner
        choice[pending] ^= 1
    return None
