"""The contrastive loss in plain torch by strips of rows, forward and backward: what runs on a CPU, and on a GPU without
Triton. No tensor is larger than the words or a strip of similarities.

A strip stays in the cache while it is worked on in place. Groups are compared as floats and powers are those of two,
because torch is slow at the others on a CPU: with 2.13 on AVX-512, in nanoseconds a number, 0.35 against 0.05 for
comparing int64 or float32 into a mask, 0.7 against 0.15 for `exp` or `exp2`, and 12 for an `exp` that underflows.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels.contrastive_interface import LOG2_E, Similarities

_STRIP_BYTES = 4 << 20
"""Of one of the three tensors of a strip; half or twice as much is as fast."""
_LEAST_ROWS = 128
"""With 32 or 64 the products take longer, for every strip reads all columns anew."""
_NEVER = -1e30
"""The logit of what is no candidate. Its power of two is 0, and 0 times it is not NaN as it would be with -inf."""


class _Chunk(NamedTuple):
    """Some anchors against all columns."""

    rows: slice
    """Among the anchors."""
    own: slice
    """The same words among the columns."""
    logits: Tensor
    """[rows, N], see `row_sums`; _NEVER or less where the row or the column is an empty slot."""
    same: Tensor
    """[rows, N], 1 where row and column are of one group, else 0."""
    room: Tensor
    """[rows, N], whatever was there."""

    def set_own(self, values: Tensor, value: float) -> None:
        """Sets the elements of [rows, N] where row and column are the same word."""
        values.diagonal(self.own.start).fill_(value)


def row_sums(similarities: Similarities) -> tuple[Tensor, Tensor]:
    """What the loss needs of every anchor, from logits (cosine - 1) x log2(e) / temperature: they are near 0 for words
    that belong together, so the difference of the two sums keeps its digits when the loss is small.

    Returns:
        The base-2 log-sum-exp of the logits over all other words, and the sum of the logits over the other words of
        the group; both [L, n], of no meaning for a word without positives.
    """
    inverse = similarities.inverse_norms
    log_sums, positive_sums = inverse.new_empty((2, len(inverse), similarities.anchors))
    for layer, unit in enumerate(_unit_columns(similarities)):
        for strip in _chunks(similarities, unit):
            strip.set_own(strip.same, 0)
            positive_sums[layer, strip.rows] = strip.same.mul_(strip.logits).sum(1)
            strip.set_own(strip.logits, _NEVER)
            highest = strip.logits.amax(1, keepdim=True)
            log_sums[layer, strip.rows] = strip.logits.sub_(highest).exp2_().sum(1).log2_().add_(highest[:, 0])
    return log_sums, positive_sums


def gradients(similarities: Similarities, offsets: Tensor, scale: Tensor) -> Tensor:
    """The gradient of every anchor, as anchor and as candidate.

    Args:
        similarities: as in `row_sums`.
        offsets: [L, N], base-2 log-sum-exp minus log2(positives); inf for words without positives.
        scale: [L], what the gradient is multiplied by.

    Returns:
        [L, n, H] in the dtype of the columns.
    """
    result = torch.empty_like(similarities.columns[:, similarities.own], memory_format=torch.contiguous_format)
    factors = similarities.inverse_norms[:, similarities.own] * scale[:, None]
    for layer, unit in enumerate(_unit_columns(similarities)):
        for strip in _chunks(similarities, unit):
            weights = torch.sub(strip.logits, offsets[layer], out=strip.room).exp2_()
            weights.add_(strip.logits.sub_(offsets[layer, strip.own, None]).exp2_()).sub_(strip.same, alpha=2)
            strip.set_own(weights, 0)
            sums = project(weights @ unit, unit[strip.own])
            result[layer, strip.rows] = sums.mul_(factors[layer, strip.rows, None])
    return result


def project(sums: Tensor, unit: Tensor) -> Tensor:
    """Takes from `sums` in place what lies along the unit vectors: a cosine does not depend on a word's length."""
    return sums.sub_((sums * unit).sum(-1, keepdim=True) * unit)


def _unit_columns(similarities: Similarities) -> Iterator[Tensor]:
    """[N, H] for every layer; 0 for empty slots."""
    for columns, inverse in zip(similarities.columns, similarities.inverse_norms, strict=True):
        yield columns * inverse[:, None]


def _chunks(similarities: Similarities, unit: Tensor) -> Iterator[_Chunk]:
    """The strips of a layer, all in the same memory."""
    total = len(unit)
    height = max(_LEAST_ROWS, _STRIP_BYTES // (unit.itemsize * max(total, 1)))
    height = min(height, similarities.anchors)
    group = similarities.groups.group.to(unit.dtype)
    scale = LOG2_E / similarities.temperature
    empty = torch.zeros_like(group).masked_fill_(group < 0, _NEVER)
    memory = unit.new_empty((3, height, total))
    for start in range(0, similarities.anchors, height):
        rows = slice(start, min(start + height, similarities.anchors))
        own = slice(similarities.first + rows.start, similarities.first + rows.stop)
        logits, same, room = memory[:, : rows.stop - start]
        torch.mm(unit[own] * scale, unit.T, out=logits)
        logits.add_(empty - scale).add_(empty[own, None])
        torch.eq(group[own, None], group, out=same)
        yield _Chunk(rows, own, logits, same, room)
