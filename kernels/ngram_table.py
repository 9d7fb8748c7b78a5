"""The dictionary on the device: token n-grams with a source language, hashed, each with its weighted translations.

A word of up to eight tokens is packed two tokens to an int64 column, the language in the top bits of the first column.
The columns are both what is hashed and what is compared, so a match is exact whatever the hash does.

The hash table is open addressing with two places per key (cuckoo hashing): a lookup reads one stored hash and one key.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_NGRAM = 8
"""Longest key, in tokens."""
TOKEN_BITS = 24
"""Bits of a token in a column; a token is stored plus one, zero means no token."""
LANGUAGE_SHIFT = 2 * TOKEN_BITS
BOUNDARY_BEFORE, BOUNDARY_AFTER, HAS_LETTER = 1, 2, 4
"""Bits of `word_boundary`: a boundary lies before, after the token; the token contains a letter."""
PLACES = 2
"""Slots a key may lie in, hence the most that a lookup has to look at."""

_GOLDEN = 0x9E3779B97F4A7C15
_ALL_64 = (1 << 64) - 1
_SALTS = 32
_INSERT_ROUNDS = 1000


class NgramTable(NamedTuple):
    """Keys and translations as tensors on one device (K keys, E language entries, C candidates, L languages).

    Key k owns the entries key_entries[k]..key_entries[k+1]-1, one per target language; entry e owns the candidates
    entry_candidates[e]..entry_candidates[e+1]-1. A draw r of 32 bits takes the first entry (or candidate) of its owner
    with r < bound. One row that nothing can match closes every list, so that an empty slot points somewhere.
    """

    word_boundary: Tensor
    """uint8 [vocabulary], bits as BOUNDARY_BEFORE, BOUNDARY_AFTER, HAS_LETTER."""
    slot_hash: Tensor
    """int64 [slots], full hash of the slot's key, 0 if empty."""
    slot_key: Tensor
    """int32 [slots], the slot's key, K if empty."""
    key_columns: Tensor
    """int64 [columns, K+1], packed tokens and language of every key."""
    key_entries: Tensor
    """int64 [K+2]."""
    entry_language: Tensor
    """int64 [E+1], target language."""
    entry_bound: Tensor
    """int64 [E+1], cumulative language weight within the key, scaled to 2^32."""
    entry_candidates: Tensor
    """int64 [E+2]."""
    candidate_bound: Tensor
    """int64 [C+1], cumulative weight within the entry, scaled to 2^32."""
    candidate_begin: Tensor
    """int64 [C+1], first token of the candidate in candidate_tokens."""
    candidate_length: Tensor
    """int64 [C+1], tokens of the candidate."""
    candidate_tokens: Tensor
    """int64 [all candidate tokens]."""
    multipliers: tuple[int, ...]
    """One odd signed 64-bit factor per column."""
    slot_bits: int
    """log2 of the number of slots."""
    entry_steps: int
    """Halvings that find an entry among the most that a key has."""
    candidate_steps: int
    """Halvings that find a candidate among the most that an entry has."""
    num_keys: int
    num_languages: int
    counts_letters: bool
    """Whether word_boundary carries HAS_LETTER, so that running words can leave out punctuation."""


def pack_first(first: Tensor, language: Tensor) -> Tensor:
    """Puts the language [..., broadcast] into the top bits of the first packed pair."""
    return first + (language.to(torch.int64) << LANGUAGE_SHIFT)


def hash_columns(columns: Sequence[Tensor], multipliers: Sequence[int]) -> Tensor:
    """64-bit multiply-add hash of packed columns, wrapping around; its upper bits choose the slots."""
    hashed = columns[0] * multipliers[0]
    for column, multiplier in zip(columns[1:], multipliers[1:], strict=True):
        hashed += column * multiplier
    return hashed


def _slots(hashed: Tensor, slot_bits: int) -> tuple[Tensor, Tensor]:
    # >> is arithmetic on int64: the mask takes the copies of the sign bit away
    mask = (1 << slot_bits) - 1
    return (hashed >> (64 - slot_bits)) & mask, (hashed >> (64 - 2 * slot_bits)) & mask


def lookup(table: NgramTable, columns: Sequence[Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Finds words in the table.

    Args:
        table: the table.
        columns: len(table.multipliers) packed int64 columns of one shape.
        wanted: bool, shaped as a column: where there is a word to look up.

    Returns:
        key (int32, some valid row of the key lists also where nothing was found) and found (bool, False where not
        wanted), shaped as a column.
    """
    shape = columns[0].shape
    # what is not wanted looks into slot 0: one line of cache instead of a random one
    hashed = hash_columns(columns, table.multipliers) * wanted
    first, second = _slots(hashed, table.slot_bits)
    # hashes of keys are distinct, so a word whose hash is not in its first slot can only be in its second
    in_first = table.slot_hash.index_select(0, first.view(-1)).view(shape) == hashed
    first ^= second
    first *= in_first
    second ^= first
    key = table.slot_key.index_select(0, second.view(-1))
    found = wanted.clone()
    for column, stored in zip(columns, table.key_columns, strict=True):
        found &= stored.index_select(0, key).view(shape) == column
    return key.view(shape), found


def draw(offsets: Tensor, bounds: Tensor, owner: Tensor, random: Tensor, steps: int) -> Tensor:
    """First item of each owner's list with random < bound, by `steps` halvings of the list.

    Args:
        offsets: int64, list of owner o is offsets[o]..offsets[o+1]-1, never empty.
        bounds: int64, rising within a list and ending at 2^32.
        owner: integer tensor [N].
        random: int64 [N], from 0 to 2^32-1.
        steps: enough halvings for the longest list; 0 if every list has one item.

    Returns:
        int64 [N], indices into bounds.
    """
    low = offsets.index_select(0, owner)
    if steps == 0:
        return low
    high = offsets.index_select(0, owner + 1) - 1
    for _ in range(steps):
        middle = (low + high) >> 1
        above = random >= bounds.index_select(0, middle)
        # below: high = middle; above: low = middle + 1 (multiplying by the condition is 3x faster than where on a CPU)
        low += (middle + 1 - low) * above
        high += (middle - high) * ~above
    return low


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
    """Builds the device table of a run; every id range is checked here, once.

    Args:
        word_boundary: [vocabulary], see `NgramTable`.
        key_tokens: tokens of all keys; key k is key_tokens[key_offsets[k]:key_offsets[k+1]], 1 to 8 tokens.
        key_offsets: [K+1].
        key_language: [K], source language.
        key_candidate_offsets: [K+1], candidates of a key, sorted by language.
        candidate_tokens: tokens of all candidates.
        candidate_offsets: [C+1].
        candidate_language: [C], target language.
        candidate_weight: [C], at least 0; a candidate of weight 0 is never drawn.
        language_weights: [L], weight of each target language in the draw, 0 for never. Its length is the number of
            languages. A key without a candidate that can be drawn is left out.
        forbidden_tokens: special tokens, end of document, padding: no key and no candidate may contain them.
        device: where the tensors go.

    Raises:
        ValueError: the arrays contradict each other or the limits above.
    """
    weights = np.asarray(language_weights, dtype=np.float64)
    _check_keys(word_boundary, key_tokens, key_offsets, key_language, len(weights), forbidden_tokens)
    _check_candidates(
        len(word_boundary),
        len(key_language),
        key_candidate_offsets,
        candidate_tokens,
        candidate_offsets,
        candidate_language,
        candidate_weight,
        weights,
        forbidden_tokens,
    )
    owner = np.repeat(np.arange(len(key_language)), np.diff(key_candidate_offsets))
    drawable = np.flatnonzero((candidate_weight > 0) & (weights[candidate_language] > 0))
    owner, target = owner[drawable], candidate_language[drawable].astype(np.int64)
    if np.any((np.diff(owner) == 0) & (np.diff(target) < 0)):
        raise ValueError("the candidates of a key must be sorted by language")
    starts_entry = np.ones(len(drawable), dtype=bool)
    starts_entry[1:] = (np.diff(owner) != 0) | (np.diff(target) != 0)
    entry_first = np.flatnonzero(starts_entry)
    keys, key_first = np.unique(owner[entry_first], return_index=True)
    entry_offsets, key_entry_offsets = np.append(entry_first, len(drawable)), np.append(key_first, len(entry_first))

    columns = torch.from_numpy(_pack_keys(key_tokens, key_offsets, key_language, keys))
    multipliers, hashed, slot_bits, slot_key = _place(columns)
    slot_hash = np.where(slot_key < len(keys), np.append(hashed.numpy(), 0)[slot_key], 0)
    closing = torch.zeros((len(columns), 1), dtype=torch.int64)
    lengths = np.diff(candidate_offsets)[drawable]

    def tensor(array: NDArray, closing_value: int | None = None) -> Tensor:
        array = array if closing_value is None else np.append(array, closing_value)
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return NgramTable(
        word_boundary=tensor(np.array(word_boundary, dtype=np.uint8)),
        slot_hash=tensor(slot_hash),
        slot_key=tensor(slot_key.astype(np.int32)),
        key_columns=torch.cat([columns, closing], dim=1).to(device),
        key_entries=tensor(key_entry_offsets, len(entry_first) + 1),
        entry_language=tensor(target[entry_first], 0),
        entry_bound=tensor(_bounds(weights[target[entry_first]], key_entry_offsets), 1 << 32),
        entry_candidates=tensor(entry_offsets, len(drawable) + 1),
        candidate_bound=tensor(_bounds(candidate_weight[drawable].astype(np.float64), entry_offsets), 1 << 32),
        candidate_begin=tensor(candidate_offsets[:-1][drawable].astype(np.int64), 0),
        candidate_length=tensor(lengths.astype(np.int64), 1),
        candidate_tokens=tensor(candidate_tokens.astype(np.int64), 0),
        multipliers=multipliers,
        slot_bits=slot_bits,
        entry_steps=int(np.diff(key_entry_offsets).max(initial=1) - 1).bit_length(),
        candidate_steps=int(np.diff(entry_offsets).max(initial=1) - 1).bit_length(),
        num_keys=len(keys),
        num_languages=len(weights),
        counts_letters=bool(np.any(word_boundary & HAS_LETTER)),
    )


def _check_offsets(name: str, offsets: NDArray, count: int, total: int, least: int, most: int) -> None:
    if len(offsets) != count + 1 or offsets[0] != 0 or offsets[-1] != total:
        ends = (int(offsets[0]), int(offsets[-1])) if len(offsets) else ()
        raise ValueError(f"{name} has {len(offsets)} items with ends {ends}, expected {count + 1} from 0 to {total}")
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
        raise ValueError(f"{name}[{wrong[0]}] is the special token {tokens[wrong[0]]}, which a word cannot contain")


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
        raise ValueError(f"the vocabulary has {vocabulary} tokens, expected fewer than {1 << TOKEN_BITS}")
    if not 0 < num_languages <= 1 << 15:
        raise ValueError(f"language_weights has {num_languages} items, expected 1 to {1 << 15}")
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
    _check_offsets("key_candidate_offsets", key_candidate_offsets, keys, count, 0, count)
    _check_offsets("candidate_offsets", candidate_offsets, count, len(candidate_tokens), 1, len(candidate_tokens))
    _check_ids("candidate_tokens", candidate_tokens, vocabulary)
    _check_ids("candidate_language", candidate_language, len(language_weights))
    _check_allowed("candidate_tokens", candidate_tokens, forbidden)
    for name, values in (("candidate_weight", candidate_weight), ("language_weights", language_weights)):
        wrong = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if len(wrong):
            raise ValueError(f"{name}[{wrong[0]}] is {values[wrong[0]]}, expected a finite number, at least 0")


def _bounds(weights: NDArray[np.float64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Cumulative weights of every list, scaled so that the last is exactly 2^32."""
    counts = np.diff(offsets)
    # list by list, not one cumulative sum over all: that would lose the bits of short lists far down the array
    running = np.zeros(len(counts))
    prefix = np.empty(len(weights))
    for rank in range(int(counts.max(initial=0))):
        longer = np.flatnonzero(counts > rank)
        running[longer] += weights[offsets[longer] + rank]
        prefix[offsets[longer] + rank] = running[longer]
    bounds = np.floor(prefix / np.repeat(running, counts) * 2.0**32 + 0.5).astype(np.int64)
    bounds[offsets[1:] - 1] = 1 << 32
    return bounds


def _pack_keys(
    key_tokens: NDArray, key_offsets: NDArray, key_language: NDArray, keys: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Packed columns [columns, len(keys)], as many as the longest of `keys` needs."""
    lengths = np.diff(key_offsets)[keys]
    columns = (int(lengths.max(initial=1)) + 1) // 2
    packed = np.zeros((columns, len(keys)), dtype=np.int64)
    for position in range(int(lengths.max(initial=0))):
        longer = np.flatnonzero(lengths > position)
        token = key_tokens[key_offsets[keys[longer]] + position].astype(np.int64) + 1
        packed[position // 2, longer] |= token << (TOKEN_BITS * (position % 2))
    packed[0] |= key_language[keys].astype(np.int64) << LANGUAGE_SHIFT
    return packed


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


def _place(columns: Tensor) -> tuple[tuple[int, ...], Tensor, int, NDArray[np.int64]]:
    """Finds a salt under which all keys have distinct hashes and a place each."""
    count = columns.shape[1]
    # load 0.2 to 0.4: cuckoo hashing with two places stops working at a load of 0.5
    slot_bits = max(2, (5 * count // 2).bit_length())
    for salt in range(_SALTS):
        multipliers = _multipliers(salt, len(columns))
        hashed = hash_columns(list(columns), multipliers)
        order = torch.argsort(hashed)
        twins = torch.nonzero(hashed[order[1:]] == hashed[order[:-1]]).view(-1)
        if len(twins):
            one, other = columns[:, order[twins]], columns[:, order[twins + 1]]
            if bool((one == other).all(dim=0).any()):
                raise ValueError("two keys have the same language and the same tokens")
            continue
        first, second = _slots(hashed, slot_bits)
        slot_key = _insert(first.numpy(), second.numpy(), 1 << slot_bits)
        if slot_key is not None:
            return multipliers, hashed, slot_bits, slot_key
    raise ValueError(f"no place found for {count} keys in {1 << slot_bits} slots with {_SALTS} salts")


def _insert(first: NDArray[np.int64], second: NDArray[np.int64], slots: int) -> NDArray[np.int64] | None:
    """Key of every slot (len(first) = empty), or None if some key finds no place: all keys move at once, in rounds."""
    count = len(first)
    places = np.stack([first, second])
    owner = np.full(slots, count, dtype=np.int64)
    choice = np.zeros(count, dtype=np.int64)
    homeless = np.arange(count)
    for _ in range(_INSERT_ROUNDS):
        wanted = places[choice[homeless], homeless]
        evicted = owner[wanted]
        owner[wanted] = homeless
        won = owner[wanted] == homeless
        evicted = evicted[won]
        homeless = np.concatenate([homeless[~won], evicted[evicted < count]])
        if len(homeless) == 0:
            return owner
        choice[homeless] ^= 1
    return None
