"""Multi-positive contrastive loss over the words of all ranks, in memory proportional to the words.

The similarities of N words are never stored: forward and backward recompute them, in tiles by the Triton kernels where
they can run, else in chunks in plain torch. Each rank computes the rows of its own words. Forward gathers the words and
their log-sum-exps once; backward needs no communication, because the similarities are symmetric: with the log-sum-exp
of every other word, a rank can compute the gradients that its words get as candidates of others.
"""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prealign.kernels import contrastive_chunked, contrastive_launch
from megatron_prealign.kernels._triton import runs_triton
from megatron_prealign.kernels.contrastive_interface import LOG2_E, Similarities, WordGroups, check_call, inverse_norms


def contrastive_loss(
    words: Tensor,
    groups: WordGroups,
    *,
    temperature: float,
    process_group: dist.ProcessGroup | None = None,
    use_kernels: bool | None = None,
) -> Tensor:
    """This rank's part of the loss; the parts of all ranks sum to the loss of `contrastive_loss_reference`.

    Args:
        words: [n, H] or [L, n, H] of float32, bfloat16 or float64: the words of this rank; n is the same on all ranks.
            Empty slots may contain any finite values.
        groups: groups of the N words of all ranks; rank r of `process_group` has words r*n to r*n + n-1.
        temperature: above 0.
        process_group: the ranks that the words are sharded over; None for this rank only.
        use_kernels: whether to use the Triton kernels; None to use them where they can run. They do not support
            float64.

    Returns:
        A scalar or [L], float32 (float64 for float64): minus the sum of log p_ij over the pairs (i, j) of a group with
        i on this rank, divided by the number of pairs of all ranks; 0 if there are no pairs.

        The gradient is that of the loss of all ranks with respect to the words of this rank. This requires that every
        rank passes the same upstream gradient to its part, layer by layer.

    Raises:
        ValueError: a shape, dtype, device or the temperature is wrong.
    """
    check_call(words, groups, temperature, 1 if process_group is None else process_group.size())
    if use_kernels is None:
        use_kernels = runs_triton(words.device)
    backend = contrastive_launch if use_kernels and words.dtype != torch.float64 else contrastive_chunked
    layers = words if words.dim() == 3 else words[None]
    loss: Tensor = _ContrastiveLoss.apply(
        layers.contiguous(), groups.group, groups.positives, groups.pairs, temperature, process_group, backend
    )
    return loss if words.dim() == 3 else loss[0]


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        words: Tensor,
        group: Tensor,
        positives: Tensor,
        pairs: Tensor,
        temperature: float,
        process_group: dist.ProcessGroup | None,
        backend: ModuleType,
    ) -> Tensor:
        columns = _gather(words, process_group)
        first = 0 if process_group is None else process_group.rank() * words.shape[1]
        groups = WordGroups(group, positives, pairs)
        norms = inverse_norms(columns, group)
        similarities = Similarities(columns, norms, groups, first, words.shape[1], temperature)
        log_sums, positive_sums = backend.row_sums(similarities)
        own = positives[similarities.own].to(log_sums.dtype)
        # 2^(logit - offset) is positives x p; an offset of inf makes it 0 for words without positives
        offsets = torch.where(own > 0, log_sums - own.log2(), float("inf"))
        offsets = _gather(offsets, process_group)
        ctx.save_for_backward(columns, norms, offsets, group, positives, pairs)
        ctx.first, ctx.anchors, ctx.temperature, ctx.backend = first, words.shape[1], temperature, backend
        return torch.where(own > 0, own * log_sums - positive_sums, 0).sum(-1) / LOG2_E / pairs.clamp(min=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        columns, norms, offsets, *groups = ctx.saved_tensors
        groups = WordGroups(*groups)
        similarities = Similarities(columns, norms, groups, ctx.first, ctx.anchors, ctx.temperature)
        scale = upstream / ctx.temperature / groups.pairs.clamp(min=1)
        return ctx.backend.gradients(similarities, offsets, scale), None, None, None, None, None, None


def _gather(local: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """All-gathers [L, n, ...] of each rank to [L, N, ...], exactly."""
    if process_group is None or process_group.size() == 1:
        return local
    ranks = process_group.size()
    # as bytes, because some versions of gloo do not support bfloat16
    sent = local.contiguous().view(torch.uint8)
    received = sent.new_empty((ranks * sent.shape[0], *sent.shape[1:]))
    dist.all_gather_into_tensor(received, sent, group=process_group)
    by_rank = received.view(local.dtype).unflatten(0, (ranks, len(local)))
    return by_rank.transpose(0, 1).flatten(1, 2).contiguous()
