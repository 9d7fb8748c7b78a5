"""The Triton kernels of code-switching; `code_switch.py` launches them, `code_switch_reference.py` defines the result.

A sequence of W source tokens is processed in blocks. `decide` computes a *decision* for every source position: whether
a word starts there, whether the table contains it, and which translation replaces it. `write` turns the decisions of a
block into output, from the state before the block: the shift of the output against the source, where the last switched
word ends, and where the document starts. Sequences of up to some thousand tokens are processed by one program each,
which carries this state along (`code_switch_row_kernel`). Longer sequences would leave most of the device idle, so for
them every block is a program: `decide_blocks_kernel` stores the decisions and sums of its block, and
`write_blocks_kernel` adds up the preceding blocks.

Names: `p_` pointer, `b_` value of a block, `o_` offsets, `m_` mask, `i_` index. B = sequences, W = source tokens of a
sequence, S = positions of the result, L = languages.
"""

import triton
import triton.language as tl

from megatron_prealign.kernels.code_switch_decide import CANDIDATE, LENGTH_SHIFT, decide, highest_threshold
from megatron_prealign.kernels.code_switch_write import COUNTS, fill, growth, write

# Long argument lists are grouped: pointers, scalars, constants.
# fmt: off


@triton.jit(do_not_specialize=["seed_low", "seed_high", "num_slots", "factor0", "factor1", "factor2", "factor3"])
def code_switch_row_kernel(
    p_source, p_starts, p_language, p_sample_id, p_thresholds, p_tokens, p_labels, p_mask, p_positions,
    p_documents, p_counts, p_word_boundary, p_slots, p_key_first, p_key_more, p_pairs, p_key_candidates,
    p_candidate_last, p_candidates, p_candidate_tokens, width, sequence, num_languages, num_slots, factor0,
    factor1, factor2, factor3, seed_low, seed_high, pad_id, eod_id, COLUMNS: tl.constexpr,
    DRAW_STEPS: tl.constexpr, LANGUAGES: tl.constexpr, COUNTS_LETTERS: tl.constexpr, HAS_STARTS: tl.constexpr,
    LABEL_MODE: tl.constexpr, MASK_EOD: tl.constexpr, RESET: tl.constexpr, BLOCK: tl.constexpr,
):
    """One program per sequence, grid (B,): processes the blocks in order and carries the state along."""
    i_row = tl.program_id(0).to(tl.int64)
    language = tl.load(p_language + i_row)
    sample_id = tl.load(p_sample_id + i_row)
    p_thresholds += tl.maximum(language, 0) * num_languages
    highest = highest_threshold(p_thresholds, language, num_languages, LANGUAGES)
    p_source += i_row * width
    p_starts += i_row * width
    p_tokens += i_row * sequence
    p_labels += i_row * sequence
    p_mask += i_row * sequence
    p_positions += i_row * sequence
    p_documents += i_row * sequence
    p_counts += i_row * (COUNTS + num_languages)
    o_language = tl.arange(0, LANGUAGES)
    tl.store(p_counts + COUNTS + o_language, tl.zeros([LANGUAGES], tl.int64), mask=o_language < num_languages)
    # the zeros must be visible before any thread of this program adds to them
    tl.debug_barrier()

    shift = tl.zeros([], tl.int32)
    reach = tl.zeros([], tl.int32)
    document = tl.zeros([], tl.int32)
    total_running = tl.zeros([], tl.int32)
    total_known = tl.zeros([], tl.int32)
    total_switched = tl.zeros([], tl.int32)
    total_truncated = tl.zeros([], tl.int32)
    for first in range(0, width, BLOCK):
        o_position = first + tl.arange(0, BLOCK)
        b_decision = decide(
            p_source, p_starts, o_position, width, language, sample_id, seed_low.to(tl.uint32, bitcast=True),
            seed_high.to(tl.uint32, bitcast=True), p_thresholds, highest, p_word_boundary, p_slots,
            p_key_first, p_key_more, p_pairs, p_key_candidates, p_candidate_last, p_candidates,
            num_slots.to(tl.int64), factor0, factor1, factor2, factor3, COLUMNS, DRAW_STEPS, COUNTS_LETTERS,
            HAS_STARTS,
        )
        shift, reach, document, running, known, switched, truncated = write(
            b_decision, o_position, shift, reach, document, p_source, width, p_tokens, p_labels, p_mask,
            p_positions, p_documents, p_counts, p_candidates, p_candidate_tokens, sequence, eod_id,
            LANGUAGES, LABEL_MODE, MASK_EOD, RESET,
        )
        total_running += running
        total_known += known
        total_switched += switched
        total_truncated += truncated
    end = width + shift
    fill(end, pad_id, p_tokens, p_labels, p_mask, p_positions, p_documents, sequence, RESET, BLOCK)
    tl.store(p_counts, total_running.to(tl.int64))
    tl.store(p_counts + 1, total_known.to(tl.int64))
    tl.store(p_counts + 2, total_switched.to(tl.int64))
    tl.store(p_counts + 3, tl.maximum(sequence - end, 0).to(tl.int64))
    tl.store(p_counts + 4, total_truncated.to(tl.int64))


@triton.jit(do_not_specialize=["seed_low", "seed_high", "num_slots", "factor0", "factor1", "factor2", "factor3"])
def decide_blocks_kernel(
    p_source, p_starts, p_language, p_sample_id, p_thresholds, p_decisions, p_sums, p_counts, p_word_boundary,
    p_slots, p_key_first, p_key_more, p_pairs, p_key_candidates, p_candidate_last, p_candidates, width,
    num_languages, num_slots, factor0, factor1, factor2, factor3, seed_low, seed_high, eod_id,
    COLUMNS: tl.constexpr, DRAW_STEPS: tl.constexpr, LANGUAGES: tl.constexpr, COUNTS_LETTERS: tl.constexpr,
    HAS_STARTS: tl.constexpr, RESET: tl.constexpr, BLOCK: tl.constexpr,
):
    """First launch for long sequences, grid (B, blocks): decisions [B, W], and for each block its shift of the output
    and (if RESET) its last document start, relative to the start of the block [B, blocks, 2]."""
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    language = tl.load(p_language + i_row)
    sample_id = tl.load(p_sample_id + i_row)
    p_thresholds += tl.maximum(language, 0) * num_languages
    highest = highest_threshold(p_thresholds, language, num_languages, LANGUAGES)
    p_source += i_row * width
    if i_block == 0:
        # LANGUAGES is at least 8, so this covers the five other counts too
        o_count = tl.arange(0, 2 * LANGUAGES)
        p_counts += i_row * (COUNTS + num_languages)
        tl.store(p_counts + o_count, tl.zeros(o_count.shape, tl.int64), mask=o_count < COUNTS + num_languages)
    o_position = i_block * BLOCK + tl.arange(0, BLOCK)
    b_decision = decide(
        p_source, p_starts + i_row * width, o_position, width, language, sample_id,
        seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True), p_thresholds, highest,
        p_word_boundary, p_slots, p_key_first, p_key_more, p_pairs, p_key_candidates, p_candidate_last,
        p_candidates, num_slots.to(tl.int64), factor0, factor1, factor2, factor3, COLUMNS, DRAW_STEPS,
        COUNTS_LETTERS, HAS_STARTS,
    )
    tl.store(p_decisions + i_row * width + o_position, b_decision, mask=o_position < width)
    m_switched, b_length, b_entry, b_size = growth(b_decision, p_candidates)
    b_growth = tl.where(m_switched, b_size - b_length, 0)
    p_sums += (i_row * tl.num_programs(1) + i_block) * 2
    tl.store(p_sums, tl.sum(b_growth, 0))
    if RESET:
        b_previous = tl.load(p_source + o_position - 1, mask=(o_position < width) & (o_position > 0), other=-1)
        b_place = tl.arange(0, BLOCK) + tl.cumsum(b_growth, 0) - b_growth
        tl.store(p_sums + 1, tl.max(tl.where(b_previous == eod_id, b_place, -1), 0))


@triton.jit
def write_blocks_kernel(
    p_source, p_decisions, p_sums, p_tokens, p_labels, p_mask, p_positions, p_documents, p_counts,
    p_candidates, p_candidate_tokens, width, sequence, num_languages, pad_id, eod_id, LANGUAGES: tl.constexpr,
    LABEL_MODE: tl.constexpr, MASK_EOD: tl.constexpr, RESET: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Second launch for long sequences, grid (B, blocks): adds up the preceding blocks and writes this one."""
    i_row = tl.program_id(0).to(tl.int64)
    i_block = tl.program_id(1)
    blocks = tl.num_programs(1)
    p_source += i_row * width
    p_decisions += i_row * width
    p_sums += i_row * blocks * 2
    p_tokens += i_row * sequence
    p_labels += i_row * sequence
    p_mask += i_row * sequence
    p_positions += i_row * sequence
    p_documents += i_row * sequence
    p_counts += i_row * (COUNTS + num_languages)

    o_block = tl.arange(0, BLOCKS)
    b_shift = tl.load(p_sums + 2 * o_block, mask=o_block < i_block, other=0)
    shift = tl.sum(b_shift, 0)
    document = tl.zeros([], tl.int32)
    if RESET:
        b_start = o_block * BLOCK + tl.cumsum(b_shift, 0) - b_shift
        b_last = tl.load(p_sums + 2 * o_block + 1, mask=o_block < i_block, other=-1)
        document = tl.maximum(tl.max(tl.where(b_last >= 0, b_start + b_last, 0), 0), 0)
    # a switched word of the previous block may reach into this one; it starts at most one key length before
    o_back = i_block * BLOCK - 8 + tl.arange(0, 8)
    b_back = tl.load(p_decisions + o_back, mask=o_back >= 0, other=0)
    b_reach = tl.where((b_back & CANDIDATE) != 0, o_back + ((b_back >> LENGTH_SHIFT) & 7) + 1, 0)

    o_position = i_block * BLOCK + tl.arange(0, BLOCK)
    b_decision = tl.load(p_decisions + o_position, mask=o_position < width, other=0)
    shift, _, document, running, known, switched, truncated = write(
        b_decision, o_position, shift, tl.max(b_reach, 0), document, p_source, width, p_tokens, p_labels,
        p_mask, p_positions, p_documents, p_counts, p_candidates, p_candidate_tokens, sequence,
        eod_id, LANGUAGES, LABEL_MODE, MASK_EOD, RESET,
    )
    tl.atomic_add(p_counts, running.to(tl.int64), sem="relaxed")
    tl.atomic_add(p_counts + 1, known.to(tl.int64), sem="relaxed")
    tl.atomic_add(p_counts + 2, switched.to(tl.int64), sem="relaxed")
    tl.atomic_add(p_counts + 4, truncated.to(tl.int64), sem="relaxed")
    if i_block == blocks - 1:
        end = width + shift
        tl.store(p_counts + 3, tl.maximum(sequence - end, 0).to(tl.int64))
        fill(end, pad_id, p_tokens, p_labels, p_mask, p_positions, p_documents, sequence, RESET, BLOCK)
