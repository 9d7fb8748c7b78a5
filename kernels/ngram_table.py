"""Dictionary table on the device: hashed token n-grams with a source language, each with its weighted translations.

A word of up to eight tokens is packed two tokens to an int64 *column*; the first column also contains the language and
the number of columns. The columns are hashed and compared, so matches are exact even if hashes collide. The hash table
uses open addressing with two slots per key (cuckoo hashing): a lookup reads two slots and one key.

Device memory: per key 19 to 20 bytes for its slots (load 0.42), 8 for its first two tokens and 8 for two offsets; per
candidate 12 bytes; for the other tokens 4 bytes each in candidates and 8 bytes per pair in keys.
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
"""Position in the first column of the number of further columns (2 bits)."""
LANGUAGE_SHIFT = COLUMNS_SHIFT + 2
"""Position in the first column of the language (12 bits, which keeps the sign bit clear)."""
MAX_LANGUAGES = 1 << 12
BOUNDARY_BEFORE, BOUNDARY_AFTER, HAS_LETTER = 1, 2, 4
"""Bits of `word_boundary`: a boundary before the token, a boundary after it, the token contains a letter."""
WORD = 0xFFFFFFFF
"""Mask of the lower 32 bits."""
SPREAD = -7046029254386353131
"""64-bit golden ratio as a signed integer, the multiplier that mixes the hash a second time."""
LENGTH_SHIFT, TARGET_SHIFT = 32, 40
"""Positions of the length and the language in an item of `candidates`."""
MAX_CANDIDATE_TOKENS = 255
"""Longest candidate, in tokens. For sequences of up to 2^22 tokens the output before truncation stays below 2^31."""
DRAW_BIAS = 1 << 31
"""Subtracted from a draw before it is compared with `candidate_last`."""


class NgramTable(NamedTuple):
    """Keys and translations as tensors on one device (K keys, C candidates, L languages, T candidate tokens).

    Key k has the candidates key_candidates[k]..key_candidates[k+1]-1. A draw r of 32 bits selects the first of them
    with r - 2^31 <= candidate_last. Keys and candidates end with a sentinel that nothing matches; empty slots point to
    it.
    """

    word_boundary: Tensor
    """uint8 [vocabulary], bits as BOUNDARY_BEFORE, BOUNDARY_AFTER, HAS_LETTER."""
    slots: Tensor
    """int64 [slots], fingerprint << 32 | key; key K and fingerprint 0 for an empty slot."""
    key_first: Tensor
    """int64 [K+1], first column of every key."""
    key_more: Tensor
    """int32 [K+1], index in `pairs` of the key's further columns, 0 if it has none."""
    pairs: Tensor
    """int64, the columns after the first of all keys; item 0 is a zero column."""
    key_candidates: Tensor
    """int32 [K+2]."""
    candidate_last: Tensor
    """int32 [C+1], the largest draw minus 2^31 that selects this candidate; combines language and candidate weights."""
    candidates: Tensor
    """int64 [C+1], target language << 40 | number of tokens << 32 | first token in `candidate_tokens`."""
    candidate_tokens: Tensor
    """int32 [T]."""
    multipliers: tuple[int, ...]
    """One odd signed 64-bit factor per column."""
    draw_steps: int
    """Binary search steps for the key with the most candidates."""
    num_keys: int
    num_languages: int
    counts_letters: bool
    """Whether word_boundary has HAS_LETTER bits, so that running words can exclude punctuation."""
    forbidden_tokens: frozenset[int]
    """Tokens that no key and no candidate contains."""

    @property
    def columns(self) -> int:
        """Number of columns of the longest key."""
        return len(self.multipliers)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors, in the order above."""
        return [each for each in self if isinstance(each, Tensor)]

    @property
    def device(self) -> torch.device:
        return self.slots.device

    @property
    def nbytes(self) -> int:
        """Device memory of all tensors."""
        return sum(each.numel() * each.element_size() for each in self.tensors)


def pack_first(pair: Tensor, language: Tensor, extra_columns: Tensor | int) -> Tensor:
    """Adds the language and the number of further columns to the first packed pair."""
    return pair + (language << LANGUAGE_SHIFT) + (extra_columns << COLUMNS_SHIFT)


def hash_columns(columns: Sequence[Tensor], multipliers: Sequence[int]) -> Tensor:
    """64-bit multiply-add hash of packed columns, with wraparound."""
    hashed = columns[0] * multipliers[0]
    for column, multiplier in zip(columns[1:], multipliers[1:], strict=True):
        hashed += column * multiplier
    return hashed


def hash_slots(hashed: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """The two slots and the fingerprint of a hash; the slots are two independent mixes of it scaled to `slots`."""
    # >> is arithmetic on int64: the mask drops the copies of the sign bit
    fingerprint = (hashed >> 32) & WORD
    mixed = (hashed ^ fingerprint) * SPREAD
    return (((mixed >> 32) & WORD) * slots) >> 32, ((mixed & WORD) * slots) >> 32, fingerprint


def lookup(table: NgramTable, columns: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Finds words in the table.

    Args:
        table: the table.
        columns: `table.columns` packed int64 columns [N], the first one by `pack_first`.

    Returns:
        key (int64 [N], a valid index into the keys even where no key was found) and found (bool [N]).
    """
    first, second, fingerprint = hash_slots(hash_columns(columns, table.multipliers), len(table.slots))
    slot = table.slots.index_select(0, first)
    # the build made sure that a key's two slots never have the same fingerprint, so the first match is the only one
    slot = torch.where((slot >> 32) & WORD == fingerprint, slot, table.slots.index_select(0, second))
    key = slot & WORD
    found = table.key_first.index_select(0, key) == columns[0]
    if len(columns) > 1:
        more = table.key_more.index_select(0, key)
        for index, column in enumerate(columns[1:]):
            # words without this column read the zero column
            found &= table.pairs.index_select(0, (more + index) * (found & (column != 0))) == column
    return key, found


def draw(table: NgramTable, key: Tensor, random: Tensor) -> Tensor:
    """Candidate selected by each draw, by binary search in the key's list.

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
