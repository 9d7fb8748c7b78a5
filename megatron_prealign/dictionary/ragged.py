"""Ragged arrays: rows of different lengths in one array, row i is `values[offsets[i]:offsets[i+1]]`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Odd, with well-mixed bits: 2^64 divided by the golden ratio.
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def offsets_of(lengths: NDArray[Any]) -> NDArray[np.int64]:
    """Returns the offsets `[N+1]` of rows with these lengths `[N]`."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def row_numbers(offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the row index of each element `[offsets[-1]]`."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def row_indices(offsets: NDArray[np.int64], rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the indices of the elements of `rows` in a ragged array, and the offsets of the concatenated rows.

    Args:
        offsets: `[N+1]`, row i is `values[offsets[i]:offsets[i+1]]`.
        rows: integers `[R]`.

    Returns:
        `index` and `new_offsets` `[R+1]`; `values[index]` is the concatenation of the chosen rows.
    """
    # Differences of all offsets would be wasteful when a few rows of very many are requested.
    begin = offsets[rows]
    lengths = offsets[rows + 1] - begin
    new_offsets = offsets_of(lengths)
    index = np.arange(new_offsets[-1], dtype=np.int64)
    index += np.repeat(begin - new_offsets[:-1], lengths)
    return index, new_offsets


def count_in_rows(marks: NDArray[np.bool_], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts the `marks` set in each row of a ragged array with these `offsets` `[N+1]`."""
    if not marks.any():
        return np.zeros(len(offsets) - 1, dtype=np.int64)
    # int32 halves the memory, which is several times faster if the system must allocate it first.
    total = np.zeros(len(marks) + 1, dtype=np.int32 if len(marks) < 2**31 else np.int64)
    np.cumsum(marks, out=total[1:])
    return np.diff(total[offsets]).astype(np.int64)


def hash_rows(tokens: NDArray[Any], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns a 64-bit hash of each row of non-negative integers `[N]`; equal rows have equal hashes."""
    lengths = np.diff(offsets)
    position = np.arange(len(tokens), dtype=np.int64) - np.repeat(offsets[:-1], lengths)
    factors = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, MULTIPLIER))
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * MULTIPLIER
    mixed ^= mixed >> np.uint64(29)
    mixed *= factors[position]
    hashes = np.zeros(len(lengths), dtype=np.uint64)
    filled = lengths > 0
    hashes[filled] = np.add.reduceat(mixed, offsets[:-1][filled]) if filled.any() else 0
    return hashes
