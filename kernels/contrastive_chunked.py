"""The contrastive loss in plain torch by strips of rows, forward and backward: what runs on a CPU, and on a GPU without
Triton. No tensor is larger than the words or a strip of similarities."""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_prealign.kernels.contrastive_interface import Similarities

_STRIP_BYTES = 4 << 20
_LEAST_ROWS = 32


def strip_rows(similarities: Similarities, itemsize: int) -> int:
    """Rows whose similarities to all columns are worked on at a time."""
    columns = similarities.columns.shape[1]
    return max(_LEAST_ROWS, min(similarities.anchors, _STRIP_BYTES // (itemsize * max(columns, 1))))


def row_sums(similarities: Similarities) -> tuple[Tensor, Tensor]:
    """What the loss needs of every anchor. A logit is (cosine - 1) / temperature: near 0 for words that belong
    together, so the difference of the two sums keeps its digits when the loss is small.

    Returns:
        The log-sum-exp of the logits over all other words (-inf without any), and the sum of the logits over the other
        words of the group (of no meaning for an empty slot); both [L, n].
    """
    group = similarities.group
    dtype = similarities.inverse_norms.dtype
    shape = (len(similarities.columns), similarities.anchors)
    log_sums, positive_sums = (torch.empty(shape, dtype=dtype, device=group.device) for _ in range(2))
    shift = similarities.inverse_norms.new_full((len(group),), -1 / similarities.temperature)
    shift.masked_fill_(group < 0, float("-inf"))
    for layer, unit in enumerate(_unit_columns(similarities)):
        for rows, own, scores in _strips(similarities, unit):
            scores += shift
            same = group[own, None] == group
            same.diagonal(own.start).fill_(False)
            torch.sum(torch.where(same, scores, 0), 1, out=positive_sums[layer, rows])
            scores.diagonal(own.start).fill_(float("-inf"))
            # finite, so that a row without candidates gives log(0) and not NaN
            highest = scores.amax(1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
            scores.sub_(highest).exp_()
            torch.sum(scores, 1, out=log_sums[layer, rows])
            log_sums[layer, rows].log_().add_(highest[:, 0])
    return log_sums, positive_sums


def gradients(similarities: Similarities, offsets: Tensor, scale: Tensor) -> Tensor:
    """The gradient of every anchor, as anchor and as candidate.

    Args:
        similarities: as in `row_sums`.
        offsets: [L, N], log-sum-exp minus log(positives); inf for words without positives.
        scale: [L], what the gradient is multiplied by.

    Returns:
        [L, n, H] in the dtype of the columns.
    """
    group, columns = similarities.group, similarities.columns
    result = torch.empty_like(columns[:, similarities.own])
    offsets = offsets + 1 / similarities.temperature
    for layer, unit in enumerate(_unit_columns(similarities)):
        factor = similarities.inverse_norms[layer, similarities.own, None] * scale[layer]
        for rows, own, scores in _strips(similarities, unit):
            weights = scores - offsets[layer]
            weights.exp_()
            weights += scores.sub_(offsets[layer, own, None]).exp_()
            weights.sub_(torch.where(group[own, None] == group, 2.0, 0.0))
            weights.diagonal(own.start).zero_()
            result[layer, rows] = project(weights @ unit, unit[own]).mul_(factor[rows])
    return result


def project(sums: Tensor, unit: Tensor) -> Tensor:
    """Takes from `sums` in place what lies along the unit vectors: a cosine does not depend on a word's length."""
    return sums.sub_((sums * unit).sum(-1, keepdim=True) * unit)


def _unit_columns(similarities: Similarities) -> Iterator[Tensor]:
    """[N, H] for every layer; zero for empty slots."""
    for columns, inverse in zip(similarities.columns, similarities.inverse_norms, strict=True):
        yield columns * inverse[:, None]


def _strips(similarities: Similarities, unit: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """For every strip its rows among the anchors, the same among the columns, and cosine / temperature [rows, N]."""
    height = strip_rows(similarities, unit.element_size())
    for start in range(0, similarities.anchors, height):
        rows = slice(start, min(start + height, similarities.anchors))
        own = slice(similarities.first + rows.start, similarities.first + rows.stop)
        yield rows, own, (unit[own] / similarities.temperature) @ unit.T
