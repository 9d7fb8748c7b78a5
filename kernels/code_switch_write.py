"""Device functions of the code-switching kernels that write the output of a block from its decisions.

Names: `p_` pointer, `b_` value of a block, `o_` offsets, `m_` mask.
"""

import triton
import triton.language as tl

from megatron_prealign.kernels import ngram_table as layout
from megatron_prealign.kernels.code_switch_decide import (
    CANDIDATE,
    FOLLOWS,
    KNOWN,
    LENGTH_SHIFT,
    RUNNING,
    TARGET_SHIFT,
    WORD,
)
from megatron_prealign.kernels.code_switch_interface import LANGUAGES_FROM

# Long argument lists are grouped: pointers, scalars, constants.
# fmt: off

_SIZE_SHIFT = tl.constexpr(layout.LENGTH_SHIFT)
_MAX_SIZE = tl.constexpr(layout.MAX_CANDIDATE_TOKENS)
# Number of columns before the languages in the counts; label modes in the order of LABEL_MODES.
COUNTS = tl.constexpr(LANGUAGES_FROM)
_INPUT_ONLY = tl.constexpr(0)
_NO_PREDICT = tl.constexpr(2)
_MIX = tl.constexpr(3)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def growth(b_decision, p_candidates):
    """Words switched in a block: mask, length, entry of the translation in the table, and its length."""
    b_candidate = (b_decision & CANDIDATE) - 1
    m_switched = b_candidate >= 0
    b_length = ((b_decision >> LENGTH_SHIFT) & 7) + 1
    b_entry = tl.load(p_candidates + b_candidate, mask=m_switched, other=0)
    return m_switched, b_length, b_entry, ((b_entry >> _SIZE_SHIFT) & _MAX_SIZE).to(tl.int32)


@triton.jit
def _write_translated(
    k, b_new, m_token, b_token, b_place, b_follows, m_scored, b_document, p_tokens, p_labels, p_mask, p_positions,
    p_documents, sequence, LABEL_MODE: tl.constexpr, RESET: tl.constexpr,
):
    """Writes the k-th token of every translation that is long enough."""
    o_out = b_place + k
    m_out = m_token & (o_out < sequence)
    tl.store(p_tokens + o_out, b_new, mask=m_out)
    if RESET:
        tl.store(p_documents + o_out, b_document, mask=m_out)
        tl.store(p_positions + o_out, (o_out - b_document).to(tl.int64), mask=m_out)
    m_label = m_token & (o_out > 0) & (o_out <= sequence)
    # the token before a later token of a translation is part of it, so m_scored matters for the first token only
    m_head = o_out == b_place
    b_scored = m_scored | (o_out > b_place)
    b_label = b_new
    if LABEL_MODE == _INPUT_ONLY:
        b_label = b_token
        b_scored = b_scored & m_head
    elif LABEL_MODE == _NO_PREDICT:
        b_scored = o_out < 0
    elif LABEL_MODE == _MIX:
        b_label = tl.where(b_follows, b_new, b_token)
        b_scored = b_scored & (b_follows | m_head)
    tl.store(p_labels + o_out - 1, tl.where(b_scored, b_label, 0), mask=m_label)
    tl.store(p_mask + o_out - 1, b_scored.to(tl.float32), mask=m_label)


@triton.jit
def _write_translations(
    m_switched, b_token, b_place, b_entry, b_size, b_follows, m_scored, b_document, p_tokens, p_labels, p_mask,
    p_positions, p_documents, p_candidate_tokens, sequence, LABEL_MODE: tl.constexpr, RESET: tl.constexpr,
):
    """Writes the tokens of the translations, the k-th of each at a time."""
    p_translation = p_candidate_tokens + (b_entry & WORD)
    longest = tl.max(tl.where(m_switched & (b_place <= sequence), tl.minimum(b_size, sequence + 1 - b_place), 0), 0)
    # two loads are in flight before the first store waits for one of them
    for k in range(0, longest, 2):
        m_first = m_switched & (k < b_size)
        m_second = m_switched & (k + 1 < b_size)
        b_first = tl.load(p_translation + k, mask=m_first, other=0).to(tl.int64)
        b_second = tl.load(p_translation + k + 1, mask=m_second, other=0).to(tl.int64)
        _write_translated(
            k, b_first, m_first, b_token, b_place, b_follows, m_scored, b_document, p_tokens, p_labels, p_mask,
            p_positions, p_documents, sequence, LABEL_MODE, RESET,
        )
        _write_translated(
            k + 1, b_second, m_second, b_token, b_place, b_follows, m_scored, b_document, p_tokens, p_labels, p_mask,
            p_positions, p_documents, sequence, LABEL_MODE, RESET,
        )


@triton.jit
def _count_targets(p_counts, b_target, m_counted, LANGUAGES: tl.constexpr):
    """Adds the words switched into each language to the counts of the sequence."""
    if LANGUAGES == 8:
        # few languages: one addition per block and language, instead of thousands of words on the same address
        for language in tl.static_range(LANGUAGES):
            count = tl.sum((m_counted & (b_target == language)).to(tl.int64), 0)
            # the count is 0 for the indices that pad to 8, which have no address
            tl.atomic_add(p_counts + language, count, mask=count > 0, sem="relaxed")
    else:
        tl.atomic_add(p_counts + b_target, tl.full(b_target.shape, 1, tl.int64), mask=m_counted, sem="relaxed")


@triton.jit
def write(
    b_decision, o_position, shift, reach, document, p_row, width, p_tokens, p_labels, p_mask, p_positions,
    p_documents, p_counts, p_candidates, p_candidate_tokens, sequence, eod_id,
    LANGUAGES: tl.constexpr, LABEL_MODE: tl.constexpr, MASK_EOD: tl.constexpr, RESET: tl.constexpr,
):
    """Writes the output of a block of source positions.

    `shift`, `reach` and `document` are the state before the block: the shift of the output against the source, the end
    of the last switched word in the source, and the start of the current document in the output. Returns the state
    after the block and the four counts of the block."""
    m_inside = o_position < width
    b_token = tl.load(p_row + o_position, mask=m_inside, other=0).to(tl.int64)
    m_switched, b_length, b_entry, b_size = growth(b_decision, p_candidates)
    b_growth = tl.where(m_switched, b_size - b_length, 0)
    b_place = o_position + shift + tl.cumsum(b_growth, 0) - b_growth
    b_reach = tl.associative_scan(tl.where(m_switched, o_position + b_length, 0), 0, _maximum)
    b_reach = tl.maximum(b_reach, reach)
    m_plain = m_inside & ((b_decision & CANDIDATE) == 0) & (o_position >= b_reach)

    m_scored = m_inside
    b_document = tl.zeros_like(b_place)
    if MASK_EOD or RESET:
        b_previous = tl.load(p_row + o_position - 1, mask=m_inside & (o_position > 0), other=-1)
        if MASK_EOD:
            m_scored = m_inside & (b_previous != eod_id)
        if RESET:
            b_document = tl.associative_scan(tl.where(b_previous == eod_id, b_place, 0), 0, _maximum)
            b_document = tl.maximum(b_document, document)
            document = tl.max(b_document, 0)

    m_out = m_plain & (b_place < sequence)
    tl.store(p_tokens + b_place, b_token, mask=m_out)
    if RESET:
        tl.store(p_documents + b_place, b_document, mask=m_out)
        tl.store(p_positions + b_place, (b_place - b_document).to(tl.int64), mask=m_out)
    else:
        tl.store(p_positions + o_position, o_position.to(tl.int64), mask=o_position < sequence)
    m_label = m_plain & (b_place > 0) & (b_place <= sequence)
    tl.store(p_labels + b_place - 1, tl.where(m_scored, b_token, 0), mask=m_label)
    tl.store(p_mask + b_place - 1, m_scored.to(tl.float32), mask=m_label)
    _write_translations(
        m_switched, b_token, b_place, b_entry, b_size, (b_decision & FOLLOWS) != 0, m_scored, b_document,
        p_tokens, p_labels, p_mask, p_positions, p_documents, p_candidate_tokens, sequence, LABEL_MODE, RESET,
    )

    m_reached = b_place < sequence
    _count_targets(p_counts + COUNTS, b_entry >> TARGET_SHIFT, m_switched & m_reached, LANGUAGES)
    running = tl.sum((m_reached & ((b_decision & RUNNING) != 0)).to(tl.int32), 0)
    known = tl.sum((m_reached & ((b_decision & KNOWN) != 0)).to(tl.int32), 0)
    switched = tl.sum((m_reached & m_switched).to(tl.int32), 0)
    m_cut = (m_plain | m_switched) & (b_place >= sequence) & (o_position < sequence)
    truncated = tl.sum(m_cut.to(tl.int32), 0)
    return shift + tl.sum(b_growth, 0), tl.max(b_reach, 0), document, running, known, switched, truncated


@triton.jit
def fill(
    end, pad_id, p_tokens, p_labels, p_mask, p_positions, p_documents, sequence, RESET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pads a sequence that ends at position `end` up to `sequence`; its last token has no label either."""
    for first in range(tl.maximum(tl.minimum(end, sequence + 1) - 1, 0), sequence, BLOCK):
        o_out = first + tl.arange(0, BLOCK)
        m_label = o_out < sequence
        m_token = m_label & (o_out >= end)
        tl.store(p_labels + o_out, tl.zeros([BLOCK], tl.int64), mask=m_label)
        tl.store(p_mask + o_out, tl.zeros([BLOCK], tl.float32), mask=m_label)
        tl.store(p_tokens + o_out, tl.full([BLOCK], pad_id, tl.int64), mask=m_token)
        if RESET:
            tl.store(p_documents + o_out, o_out, mask=m_token)
            tl.store(p_positions + o_out, tl.zeros([BLOCK], tl.int64), mask=m_token)
