"""Philox 4x32-10 in plain torch: random integers as a function of a counter and a key, without state.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). torch has hardly any unsigned 32-bit arithmetic,
so a 32-bit word is stored in an int64 whose upper half is zero. A product of two words wraps into the sign bit, which
keeps all 64 bits correct: the low word is the lower half, the high word the upper half after masking off the sign bits
that the arithmetic shift inserts.
"""

from torch import Tensor

from megatron_prealign.kernels.ngram_table import WORD

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for every counter.

    Args:
        counter: four int64 tensors of values from 0 to 2^32-1, of shapes that broadcast together. Use size 1 for
            dimensions along which a word does not vary: the first rounds then cost next to nothing.
        key: two integers from 0 to 2^32-1.

    Returns:
        Four int64 tensors of the broadcast shape, values from 0 to 2^32-1.

    Raises:
        ValueError: a key word is out of range.
    """
    if not all(0 <= word <= WORD for word in key):
        raise ValueError(f"Philox key words must be in [0, 2^32-1], got {key}")
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1 and c3 keep their product's upper half: it only enters an xor, and the mask after that drops it
        c0 = (((product1 >> 32) ^ c1) ^ k0) & WORD
        c2 = (((product0 >> 32) ^ c3) ^ k1) & WORD
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & WORD, (k1 + _KEY_STEPS[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD
