"""Device functions of the code-switching kernels that decide which words of a block are switched, and to what.

Names: `p_` pointer, `b_` value of a block, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

from megatron_prealign.kernels import ngram_table as layout

# Long argument lists are grouped: pointers, scalars, constants.
# fmt: off

# A decision (int32): the candidate plus one (0 if not switched), the word's length minus one, and three flags.
CANDIDATE = tl.constexpr((1 << 25) - 1)
LENGTH_SHIFT = tl.constexpr(25)
KNOWN = tl.constexpr(1 << 28)
RUNNING = tl.constexpr(1 << 29)
FOLLOWS = tl.constexpr(1 << 30)

WORD = tl.constexpr(layout.WORD)
TARGET_SHIFT = tl.constexpr(layout.TARGET_SHIFT)
_BEFORE = tl.constexpr(layout.BOUNDARY_BEFORE)
_AFTER = tl.constexpr(layout.BOUNDARY_AFTER)
_LETTER = tl.constexpr(layout.HAS_LETTER)
_TOKEN_BITS = tl.constexpr(layout.TOKEN_BITS)
_COLUMNS_SHIFT = tl.constexpr(layout.COLUMNS_SHIFT)
_LANGUAGE_SHIFT = tl.constexpr(layout.LANGUAGE_SHIFT)
_SPREAD = tl.constexpr(layout.SPREAD)
_DRAW_BIAS = tl.constexpr(layout.DRAW_BIAS)
_HALF = tl.constexpr(1 << 31)


@triton.jit
def _upper_half(x):
    """Bits 32..63 of an int64 as a value from 0 to 2^32-1."""
    return (x >> 32) & WORD


@triton.jit
def _word(
    p_row, p_row_starts, p_word_boundary, o_position, m_inside, width, COLUMNS: tl.constexpr,
    HAS_STARTS: tl.constexpr,
):
    """The word that starts at each position: whether one does, its flags, whether it ends within the sequence and the
    table's columns, its length, and its columns (the first without language)."""
    b_token = tl.load(p_row + o_position, mask=m_inside, other=0)
    b_flags = tl.load(p_word_boundary + b_token, mask=m_inside, other=0)
    m_before = m_inside & (o_position > 0)
    b_before = tl.load(p_row + o_position - 1, mask=m_before, other=0)
    b_before = tl.load(p_word_boundary + b_before, mask=m_before, other=0)
    b_opens = (b_flags & _BEFORE) | (b_before & _AFTER)
    if HAS_STARTS:
        b_opens |= tl.load(p_row_starts + o_position, mask=m_inside, other=0)
    m_start = m_inside & (b_opens != 0)

    b_first = b_token.to(tl.int64) + 1
    b_second = tl.zeros_like(b_first)
    b_third = tl.zeros_like(b_first)
    b_fourth = tl.zeros_like(b_first)
    b_length = tl.full(o_position.shape, 1, tl.int32)
    b_last = b_flags
    # reads flags only where the word continues: most words are one or two tokens long
    m_open = m_start
    m_complete = o_position < 0
    for ahead in tl.static_range(1, 2 * COLUMNS + 1):
        m_row = o_position + ahead < width
        # not masked by m_open: these reads have no dependencies, and the next positions are in the cache anyway
        b_next = tl.load(p_row + o_position + ahead, mask=m_row, other=0)
        m_open = m_open & m_row
        b_next_flags = tl.load(p_word_boundary + b_next, mask=m_open, other=0)
        b_opens = (b_next_flags & _BEFORE) | (b_last & _AFTER)
        if HAS_STARTS:
            b_opens |= tl.load(p_row_starts + o_position + ahead, mask=m_open, other=0)
        m_complete = m_complete | (m_open & (b_opens != 0))
        m_open = m_open & (b_opens == 0)
        b_last = b_next_flags
        # of the token after the longest key it only matters whether the word ends before it
        if ahead < 2 * COLUMNS:
            b_length += m_open.to(tl.int32)
            b_stored = tl.where(m_open, b_next.to(tl.int64) + 1, 0) << (_TOKEN_BITS * (ahead % 2))
            if ahead // 2 == 0:
                b_first += b_stored
            elif ahead // 2 == 1:
                b_second += b_stored
            elif ahead // 2 == 2:
                b_third += b_stored
            else:
                b_fourth += b_stored
    return m_start, b_flags, m_complete, b_length, b_first, b_second, b_third, b_fourth


@triton.jit
def _key(
    b_first, b_second, b_third, b_fourth, m_wanted, p_slots, p_key_first, p_key_more, p_pairs, num_slots,
    factor0, factor1, factor2, factor3, COLUMNS: tl.constexpr,
):
    """The key of each word and whether the table contains it (compared token by token)."""
    b_hash = b_first * factor0
    if COLUMNS > 1:
        b_hash += b_second * factor1
    if COLUMNS > 2:
        b_hash += b_third * factor2
    if COLUMNS > 3:
        b_hash += b_fourth * factor3
    b_fingerprint = _upper_half(b_hash)
    b_mixed = (b_hash ^ b_fingerprint) * _SPREAD
    # loads both slots at once: waiting for the first before reading the second would cost another memory latency
    b_slot = tl.load(p_slots + ((_upper_half(b_mixed) * num_slots) >> 32), mask=m_wanted, other=0)
    b_other = tl.load(p_slots + (((b_mixed & WORD) * num_slots) >> 32), mask=m_wanted, other=0)
    b_key = tl.where(_upper_half(b_slot) == b_fingerprint, b_slot, b_other) & WORD
    m_known = m_wanted & (tl.load(p_key_first + b_key, mask=m_wanted, other=-1) == b_first)
    if COLUMNS > 1:
        m_longer = m_known & (b_second != 0)
        p_rest = p_pairs + tl.load(p_key_more + b_key, mask=m_longer, other=0)
        m_known = m_known & (tl.load(p_rest, mask=m_longer, other=0) == b_second)
        if COLUMNS > 2:
            m_longer = m_known & (b_third != 0)
            m_known = m_known & (tl.load(p_rest + 1, mask=m_longer, other=0) == b_third)
        if COLUMNS > 3:
            m_longer = m_known & (b_fourth != 0)
            m_known = m_known & (tl.load(p_rest + 2, mask=m_longer, other=0) == b_fourth)
    return b_key, m_known


@triton.jit
def _translation(
    b_key, m_known, o_position, sample_id, seed_low, seed_high, p_thresholds, highest, p_key_candidates,
    p_candidate_last, p_candidates, DRAW_STEPS: tl.constexpr,
):
    """The candidate that replaces each known word, whether it does, and whether mode "mix" predicts it."""
    b_zero = tl.zeros_like(o_position)
    b_low_id = (b_zero + (sample_id & WORD)).to(tl.uint32)
    b_high_id = (b_zero + _upper_half(sample_id)).to(tl.uint32)
    b_decision, b_which, _, b_label = tl.philox_impl(
        o_position.to(tl.uint32), b_low_id, b_high_id, b_zero.to(tl.uint32), seed_low, seed_high
    )
    b_decision = b_decision.to(tl.int64)
    # no threshold is above the highest: only few words remain from here on
    m_wanted = m_known & (b_decision < highest)
    b_low = tl.load(p_key_candidates + b_key, mask=m_wanted, other=0)
    if DRAW_STEPS > 0:
        b_high = tl.load(p_key_candidates + b_key + 1, mask=m_wanted, other=1) - 1
        b_biased = b_which.to(tl.int64) - _DRAW_BIAS
        for _ in tl.static_range(DRAW_STEPS):
            b_middle = (b_low + b_high) >> 1
            b_above = b_biased > tl.load(p_candidate_last + b_middle, mask=m_wanted, other=0)
            b_low = tl.where(b_above, b_middle + 1, b_low)
            b_high = tl.where(b_above, b_high, b_middle)
    b_target = tl.load(p_candidates + b_low, mask=m_wanted, other=0) >> TARGET_SHIFT
    m_switched = m_wanted & (b_decision < tl.load(p_thresholds + b_target, mask=m_wanted, other=0))
    return b_low, m_switched, b_label < _HALF


@triton.jit
def decide(
    p_row, p_row_starts, o_position, width, language, sample_id, seed_low, seed_high, p_thresholds, highest,
    p_word_boundary, p_slots, p_key_first, p_key_more, p_pairs, p_key_candidates, p_candidate_last,
    p_candidates, num_slots, factor0, factor1, factor2, factor3, COLUMNS: tl.constexpr,
    DRAW_STEPS: tl.constexpr, COUNTS_LETTERS: tl.constexpr, HAS_STARTS: tl.constexpr,
):
    """The decisions (int32) of a block of source positions."""
    m_start, b_flags, m_complete, b_length, b_first, b_second, b_third, b_fourth = _word(
        p_row, p_row_starts, p_word_boundary, o_position, o_position < width, width, COLUMNS, HAS_STARTS
    )
    if COLUMNS > 1:
        b_first += (b_second != 0).to(tl.int64) << _COLUMNS_SHIFT
    if COLUMNS > 2:
        b_first += (b_third != 0).to(tl.int64) << _COLUMNS_SHIFT
    if COLUMNS > 3:
        b_first += (b_fourth != 0).to(tl.int64) << _COLUMNS_SHIFT
    b_first += language << _LANGUAGE_SHIFT
    # no lookups in a sequence whose language is not in the table
    m_wanted = m_complete & (o_position < tl.where(language >= 0, width, 0))
    b_key, m_known = _key(
        b_first, b_second, b_third, b_fourth, m_wanted, p_slots, p_key_first, p_key_more, p_pairs, num_slots,
        factor0, factor1, factor2, factor3, COLUMNS,
    )
    b_candidate, m_switched, b_follows = _translation(
        b_key, m_known, o_position, sample_id, seed_low, seed_high, p_thresholds, highest, p_key_candidates,
        p_candidate_last, p_candidates, DRAW_STEPS,
    )
    m_running = m_start
    if COUNTS_LETTERS:
        m_running = m_running & ((b_flags & _LETTER) != 0)
    b_decision = tl.where(m_switched, b_candidate + 1, 0) | ((b_length - 1) << LENGTH_SHIFT)
    b_decision |= tl.where(m_known, KNOWN, 0) | tl.where(m_running, RUNNING, 0)
    return b_decision | tl.where(b_follows, FOLLOWS, 0)


@triton.jit
def highest_threshold(p_thresholds, language, num_languages, LANGUAGES: tl.constexpr):
    """The highest threshold of a source language; 0 for a sequence that is never switched."""
    o_language = tl.arange(0, LANGUAGES)
    m_language = o_language < tl.where(language >= 0, num_languages, 0)
    return tl.max(tl.load(p_thresholds + o_language, mask=m_language, other=0), 0)
