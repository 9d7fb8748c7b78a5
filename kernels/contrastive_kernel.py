"""The Triton kernels of the contrastive loss; `contrastive_launch.py` launches them, `contrastive_reference.py` defines
what they compute.

Every product of words is tiled: a program keeps the dot products of BLOCK_M words with BLOCK_N others in registers and
accumulates BLOCK_K elements of each word at a time. Norms are applied to the products, so the tensor cores process the
raw words. A logit is (cosine - 1) / temperature in base 2, since the hardware computes exp2 and log2.

Names: `p_` pointer, `b_` value of a block, `o_` offsets, `m_` mask, `i_` index. L = layers, N = words of all ranks,
H = elements per word. No sum depends on the order in which programs run.
"""

import triton
import triton.language as tl

from megatron_prealign.kernels._triton import INTERPRETED

WIDEN = tl.constexpr(INTERPRETED)
"""The interpreter does not support products of bfloat16 and is slow for float16. In float32 the products are exact."""

# Long argument lists are grouped: pointers, scalars, constants.
# fmt: off


@triton.jit
def dot_tile(
    p_columns, o_row, o_column, hidden, PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: dot products of the words at `o_row` with those at `o_column`."""
    o_k = tl.arange(0, BLOCK_K)
    p_row = p_columns + o_row[:, None].to(tl.int64) * hidden + o_k[None, :]
    p_column = p_columns + o_column[None, :].to(tl.int64) * hidden + o_k[:, None]
    b_dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, hidden, BLOCK_K):
        if EVEN:
            b_row, b_column = tl.load(p_row), tl.load(p_column)
        else:
            b_row = tl.load(p_row, mask=o_k[None, :] < hidden - k, other=0.0)
            b_column = tl.load(p_column, mask=o_k[:, None] < hidden - k, other=0.0)
        if WIDEN:
            b_row, b_column = b_row.to(tl.float32), b_column.to(tl.float32)
        b_dot = tl.dot(b_row, b_column, b_dot, input_precision=PRECISION)
        p_row += BLOCK_K
        p_column += BLOCK_K
    return b_dot


@triton.jit
def row_sums_kernel(
    p_columns, p_inverse_norms, p_group, p_log_sums, p_positive_sums, total, hidden, first, anchors, tiles, scale,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Forward, grid (splits, row blocks, L): each program iterates over `tiles` tiles of columns and stores for its
    rows the base-2 log-sum-exp of the logits over these columns, and their sum over the group; both
    [L, splits, anchors]."""
    i_split, i_block, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_columns += i_layer * total * hidden
    p_inverse_norms += i_layer * total
    o_anchor = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    # rows past the end repeat the last one and are not stored
    o_row = first + tl.minimum(o_anchor, anchors - 1)
    b_row_norm = tl.load(p_inverse_norms + o_row)
    b_row_group = tl.load(p_group + o_row)
    # finite, so that rows without candidates give log(0) instead of NaN
    b_highest = tl.full([BLOCK_M], -1e30, tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_positive = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(i_split * tiles, tl.minimum((i_split + 1) * tiles, tl.cdiv(total, BLOCK_N))):
        o_column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        b_dot = dot_tile(
            p_columns, o_row, tl.minimum(o_column, total - 1), hidden, PRECISION, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
        )
        b_norm = tl.load(p_inverse_norms + o_column, mask=o_column < total, other=0.0)
        b_group = tl.load(p_group + o_column, mask=o_column < total, other=-1)
        m_candidate = (b_group[None, :] >= 0) & (o_row[:, None] != o_column[None, :])
        b_logit = (b_dot * b_row_norm[:, None] * b_norm[None, :] - 1) * scale
        m_positive = m_candidate & (b_row_group[:, None] == b_group[None, :])
        b_positive += tl.sum(tl.where(m_positive, b_logit, 0.0), 1)
        b_logit = tl.where(m_candidate, b_logit, float("-inf"))
        b_higher = tl.maximum(b_highest, tl.max(b_logit, 1))
        b_sum = b_sum * tl.exp2(b_highest - b_higher) + tl.sum(tl.exp2(b_logit - b_higher[:, None]), 1)
        b_highest = b_higher
    o_result = (i_layer * tl.num_programs(0) + i_split) * anchors + o_anchor
    tl.store(p_log_sums + o_result, b_highest + tl.log2(b_sum), mask=o_anchor < anchors)
    tl.store(p_positive_sums + o_result, b_positive, mask=o_anchor < anchors)


@triton.jit
def weights_kernel(
    p_columns, p_inverse_norms, p_group, p_offsets, p_factors, p_weights, total, hidden, first, anchors, stride, scale,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Backward of a chunk of rows, grid (row blocks, column blocks, L): weight of every column in the gradient of every
    row, times the column's factor; [L, anchors, stride], 0 from column N on."""
    i_block, i_tile, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_columns += i_layer * total * hidden
    p_inverse_norms += i_layer * total
    p_offsets += i_layer * total
    p_factors += i_layer * total
    o_anchor = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = first + tl.minimum(o_anchor, anchors - 1)
    o_column = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    b_dot = dot_tile(
        p_columns, o_row, tl.minimum(o_column, total - 1), hidden, PRECISION, EVEN, BLOCK_M, BLOCK_N, BLOCK_K
    )
    m_column = o_column < total
    b_norm = tl.load(p_inverse_norms + o_column, mask=m_column, other=0.0)
    b_group = tl.load(p_group + o_column, mask=m_column, other=-1)
    b_offset = tl.load(p_offsets + o_column, mask=m_column, other=0.0)
    b_factor = tl.load(p_factors + o_column, mask=m_column, other=0.0)
    b_logit = (b_dot * tl.load(p_inverse_norms + o_row)[:, None] * b_norm[None, :] - 1) * scale
    b_weight = tl.exp2(b_logit - tl.load(p_offsets + o_row)[:, None]) + tl.exp2(b_logit - b_offset[None, :])
    b_row_group = tl.load(p_group + o_row)
    b_weight = tl.where(b_row_group[:, None] == b_group[None, :], b_weight - 2, b_weight)
    # empty slots are not candidates of any word: their powers may exceed any probability
    m_candidate = (b_row_group[:, None] >= 0) & (b_group[None, :] >= 0) & (o_row[:, None] != o_column[None, :])
    b_weight = tl.where(m_candidate, b_weight * b_factor[None, :], 0.0)
    p_weight = p_weights + (i_layer * anchors + o_anchor)[:, None] * stride + o_column[None, :]
    m_weight = (o_anchor < anchors)[:, None] & (o_column < stride)[None, :]
    tl.store(p_weight, b_weight.to(p_weights.dtype.element_ty), mask=m_weight)


@triton.jit
def weighted_sums_kernel(
    p_values, p_weights, p_sums, total, hidden, anchors, stride, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Weights [L, anchors, stride] times values [L, N, H], grid (hidden blocks, row blocks, L): float32
    [L, anchors, H]. `stride` is a multiple of BLOCK_K, and the weights from N on are 0."""
    i_hidden, i_block, i_layer = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_anchor = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_hidden = i_hidden * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    o_row = i_layer * anchors + tl.minimum(o_anchor, anchors - 1)
    p_weight = p_weights + o_row[:, None] * stride + o_k[None, :]
    p_values += i_layer * total * hidden + o_hidden[None, :]
    m_hidden = o_hidden[None, :] < hidden
    b_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, stride, BLOCK_K):
        o_column = tl.minimum(k + o_k, total - 1).to(tl.int64)
        b_weight = tl.load(p_weight)
        b_value = tl.load(p_values + o_column[:, None] * hidden, mask=m_hidden, other=0.0)
        if WIDEN:
            b_weight, b_value = b_weight.to(tl.float32), b_value.to(tl.float32)
        b_sums = tl.dot(b_weight, b_value, b_sums, input_precision=PRECISION)
        p_weight += BLOCK_K
    p_sum = p_sums + (i_layer * anchors + o_anchor)[:, None] * hidden + o_hidden[None, :]
    tl.store(p_sum, b_sums, mask=(o_anchor < anchors)[:, None] & m_hidden)
