"""Contrastive loss in plain torch in chunks of rows, forward and backward, for CPUs and for GPUs without Triton.

No tensor is larger than the words or one chunk of similarities.

A chunk stays in the cache while it is processed in place. Groups are compared as floats and exponentials are base 2,
because torch is slow at the alternatives on a CPU: torch 2.13 on AVX-512 takes, in nanoseconds per element, 0.35 or
0.05 to compare int64 or float32 into a mask, 0.7 or 0.15 for `exp` or `exp2`, and 12 for an `exp` that underflows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels.contrastive_interface import LOG2_E, Similarities

_CHUNK_BYTES = 4 << 20
"""Size of each of the three tensors of a chunk; half or twice as much is as fast."""
_MIN_CHUNK_ROWS = 128
"""Minimum rows of a chunk. With 32 or 64 the matrix products take longer, since every chunk reads all columns again."""
_MASKED = -1e30
"""Logit of masked candidates. 2 to this power is 0, and 0 times it is not NaN as it would be with -inf."""


class _Chunk(NamedTuple):
    """Some of the anchors against all columns."""

    rows: slice
    """Range of anchors."""
    own: slice
    """The same words in the columns."""
    logits: Tensor
    """[rows, N], see `row_sums`; _MASKED or less where the row or the column is an empty slot."""
    same: Tensor
    """[rows, N], 1 where row and column are in the same group, else 0."""
    scratch: Tensor
    """[rows, N], uninitialised."""

    def set_own(self, values: Tensor, value: float) -> None:
        """Sets the elements of [rows, N] where row and column are the same word."""
        values.diagonal(self.own.start).fill_(value)


def row_sums(similarities: Similarities) -> tuple[Tensor, Tensor]:
    """Sums over the columns that the loss needs for every anchor, from logits (cosine - 1) x log2(e) / temperature.

    These logits are near 0 for words of a group, so the difference of the two sums stays accurate for a small loss.

    Returns:
        The base-2 log-sum-exp of the logits over all other words, and the sum of the logits over the other words of
        the group; both [L, n], undefined for words without positives.
    """
    inverse = similarities.inverse_norms
    log_sums, positive_sums = inverse.new_empty((2, len(inverse), similarities.anchors))
    for layer, unit in enumerate(_unit_columns(similarities)):
        for chunk in _chunks(similarities, unit):
            chunk.set_own(chunk.same, 0)
            positive_sums[layer, chunk.rows] = chunk.same.mul_(chunk.logits).sum(1)
            chunk.set_own(chunk.logits, _MASKED)
            highest = chunk.logits.amax(1, keepdim=True)
            log_sums[layer, chunk.rows] = chunk.logits.sub_(highest).exp2_().sum(1).log2_().add_(highest[:, 0])
    return log_sums, positive_sums


def gradients(similarities: Similarities, offsets: Tensor, scale: Tensor) -> Tensor:
    """Gradient of every anchor, both as anchor and as candidate.

    Args:
        similarities: as in `row_sums`.
        offsets: [L, N], base-2 log-sum-exp minus log2(positives); inf for words without positives.
        scale: [L], factor of the gradient.

    Returns:
        [L, n, H] in the dtype of the columns.
    """
    result = torch.empty_like(similarities.columns[:, similarities.own], memory_format=torch.contiguous_format)
    factors = similarities.inverse_norms[:, similarities.own] * scale[:, None]
    for layer, unit in enumerate(_unit_columns(similarities)):
        for chunk in _chunks(similarities, unit):
            weights = torch.sub(chunk.logits, offsets[layer], out=chunk.scratch).exp2_()
            weights.add_(chunk.logits.sub_(offsets[layer, chunk.own, None]).exp2_()).sub_(chunk.same, alpha=2)
            chunk.set_own(weights, 0)
            sums = project(weights @ unit, unit[chunk.own])
            result[layer, chunk.rows] = sums.mul_(factors[layer, chunk.rows, None])
    return result


def project(sums: Tensor, unit: Tensor) -> Tensor:
    """Removes from `sums` in place the components along the unit vectors, since a cosine does not depend on length."""
    return sums.sub_((sums * unit).sum(-1, keepdim=True) * unit)


def _unit_columns(similarities: Similarities) -> Iterator[Tensor]:
    """Normalised words [N, H] of every layer; 0 for empty slots."""
    for columns, inverse in zip(similarities.columns, similarities.inverse_norms, strict=True):
        yield columns * inverse[:, None]


def _chunks(similarities: Similarities, unit: Tensor) -> Iterator[_Chunk]:
    """Yields the chunks of a layer, all in the same memory."""
    total = len(unit)
    height = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // (unit.itemsize * max(total, 1)))
    height = min(height, similarities.anchors)
    group = similarities.groups.group.to(unit.dtype)
    scale = LOG2_E / similarities.temperature
    empty = torch.zeros_like(group).masked_fill_(group < 0, _MASKED)
    memory = unit.new_empty((3, height, total))
    for start in range(0, similarities.anchors, height):
        rows = slice(start, min(start + height, similarities.anchors))
        own = slice(similarities.first + rows.start, similarities.first + rows.stop)
        logits, same, scratch = memory[:, : rows.stop - start]
        torch.mm(unit[own] * scale, unit.T, out=logits)
        logits.add_(empty - scale).add_(empty[own, None])
        torch.eq(group[own, None], group, out=same)
        yield _Chunk(rows, own, logits, same, scratch)
