"""The dictionary on the device: token n-grams with a source language, hashed, each with its weighted translations.

A word of up to eight tokens is packed two tokens to an int64 *column*; the first column also holds the language and
the number of columns. The columns are both what is hashed and what is compared, so a match is exact whatever the hash
does. The hash table is open addressing with two places per key (cuckoo hashing): a lookup reads two slots and one key.

Device memory: 19 to 20 bytes a key for its slots (load 0.42), 8 for its first two tokens, 8 for two offsets, 12 a
candidate, and the other tokens: 4 bytes each in candidates, 8 bytes a pair in keys.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_NGRAM = 8
"""Longest key, in tokens."""
TOKEN_BITS = 24
"""Bits of a token in a column; a token is stored plus one, zero means no token."""
COLUMNS_SHIFT = 2 * TOKEN_BITS
"""Where the number of columns behind the first one stands in the first (2 bits)."""
LANGUAGE_SHIFT = COLUMNS_SHIFT + 2
"""Where the language stands in the first column (12 bits, which leaves the sign alone)."""
MAX_LANGUAGES = 1 << 12
BOUNDARY_BEFORE, BOUNDARY_AFTER, HAS_LETTER = 1, 2, 4
"""Bits of `word_boundary`: a boundary lies before, after the token; the token contains a letter."""
WORD = 0xFFFFFFFF
"""The lower 32 bits."""
SPREAD = -7046029254386353131
"""The golden ratio in 64 bits as a signed integer: spreads the hash a second time."""
LENGTH_SHIFT, TARGET_SHIFT = 32, 40
"""Where the length and the language stand in a `candidate`."""
MAX_CANDIDATE_TOKENS = 255
"""Longest candidate. With rows of up to 2^22 tokens the output of a row, before it is cut, stays below 2^31."""
DRAW_BIAS = 1 << 31
"""What is taken off a draw before it is compared with a `candidate_last`."""


class NgramTable(NamedTuple):
    """Keys and translations as tensors on one device (K keys, C candidates, L languages, T candidate tokens).

    Key k owns the candidates key_candidates[k]..key_candidates[k+1]-1. A draw r of 32 bits takes the first of them with
    r - 2^31 <= candidate_last. One row that nothing can match closes the keys and the candidates, so that an empty slot
    points somewhere.
    """

    word_boundary: Tensor
    """uint8 [vocabulary], bits as BOUNDARY_BEFORE, BOUNDARY_AFTER, HAS_LETTER."""
    slots: Tensor
    """int64 [slots], fingerprint << 32 | key; an empty slot holds key K and no fingerprint."""
    key_first: Tensor
    """int64 [K+1], first column of every key."""
    key_more: Tensor
    """int32 [K+1], where in `pairs` the key's other columns begin, 0 if it has none."""
    pairs: Tensor
    """int64, columns behind the first, after one column of zero."""
    key_candidates: Tensor
    """int32 [K+2]."""
    candidate_last: Tensor
    """int32 [C+1], the largest draw minus 2^31 that takes this candidate; language and candidate weights in one."""
    candidates: Tensor
    """int64 [C+1], target language << 40 | number of tokens << 32 | first token in `candidate_tokens`."""
    candidate_tokens: Tensor
    """int32 [T]."""
    multipliers: tuple[int, ...]
    """One odd signed 64-bit factor per column."""
    draw_steps: int
    """Halvings that find a candidate among the most that a key has."""
    num_keys: int
    num_languages: int
    counts_letters: bool
    """Whether word_boundary carries HAS_LETTER, so that running words can leave out punctuation."""
    forbidden_tokens: frozenset[int]
    """Tokens that no key and no candidate contains."""

    @property
    def columns(self) -> int:
        """Columns of the longest key."""
        return len(self.multipliers)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that lies on the device, in the order above."""
        return [each for each in self if isinstance(each, Tensor)]

    @property
    def device(self) -> torch.device:
        return self.slots.device

    @property
    def nbytes(self) -> int:
        """Device memory of all tensors."""
        return sum(each.numel() * each.element_size() for each in self.tensors)


def pack_first(pair: Tensor, language: Tensor, columns_behind: Tensor | int) -> Tensor:
    """Puts the language and the number of columns behind the first one into the first packed pair."""
    return pair + (language << LANGUAGE_SHIFT) + (columns_behind << COLUMNS_SHIFT)


def hash_columns(columns: Sequence[Tensor], multipliers: Sequence[int]) -> Tensor:
    """64-bit multiply-add hash of packed columns, wrapping around."""
    hashed = columns[0] * multipliers[0]
    for column, multiplier in zip(columns[1:], multipliers[1:], strict=True):
        hashed += column * multiplier
    return hashed


def places_of(hashed: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two slots and the fingerprint of a hash: two independent products of it scaled to the number of slots."""
    # >> is arithmetic on int64: the mask takes the copies of the sign bit away
    fingerprint = (hashed >> 32) & WORD
    mixed = (hashed ^ fingerprint) * SPREAD
    return (((mixed >> 32) & WORD) * slots) >> 32, ((mixed & WORD) * slots) >> 32, fingerprint


def lookup(table: NgramTable, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Finds words in the table.

    Args:
        table: the table.
        columns: `table.columns` packed int64 columns [N], the first one by `pack_first`.

    Returns:
        key (int64 [N], some valid row of the key lists also where nothing was found) and found (bool [N]).
    """
    first, second, fingerprint = places_of(hash_columns(columns, table.multipliers), len(table.slots))
    slot = table.slots.index_select(0, first)
    # no key's other place is held by one of the same fingerprint (the build looked), so the first match is the only one
    slot = torch.where((slot >> 32) & WORD == fingerprint, slot, table.slots.index_select(0, second))
    key = slot & WORD
    found = table.key_first.index_select(0, key) == columns[0]
    if len(columns) > 1:
        more = table.key_more.index_select(0, key)
        for behind, column in enumerate(columns[1:]):
            # words without this column look at the zero in front
            found &= table.pairs.index_select(0, (more + behind) * (found & (column != 0))) == column
    return key, found


def draw(table: NgramTable, key: Tensor, random: Tensor) -> Tensor:
    """The candidate that each draw takes, by halving the key's list.

    Args:
        table: the table.
        key: int64 [N].
        random: int64 [N], from 0 to 2^32-1.

    Returns:
        int64 [N], indices into candidates.
    """
    low = table.key_candidates.index_select(0, key).to(torch.int64)
    if table.draw_steps == 0:
        return low
    high = table.key_candidates.index_select(0, key + 1).to(torch.int64) - 1
    biased = random - DRAW_BIAS
    for _ in range(table.draw_steps):
        middle = (low + high) >> 1
        above = biased > table.candidate_last.index_select(0, middle)
        low, high = torch.where(above, middle + 1, low), torch.where(above, high, middle)
    return low
