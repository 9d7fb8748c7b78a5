"""The multi-positive contrastive loss over the words of all ranks, in memory of the words alone.

The similarities of N words are never stored: forward and backward compute them anew, in tiles by the Triton kernels
where they can run, else by strips in plain torch. Each rank computes the rows of its own words; forward sends its words
and their log-sum-exps once, backward sends nothing, because the similarities are symmetric: a rank that knows the
log-sum-exp of every other word computes what its words get as candidates of others by itself.
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
        words: [n, H] or [L, n, H] of float32, bfloat16 or float64: the words of this rank, of which there are n on
            every rank. An empty slot may hold any finite numbers.
        groups: of the N words of all ranks; rank r of `process_group` holds r*n to r*n + n-1.
        temperature: above 0.
        process_group: the ranks that share the words; None for this rank alone.
        use_kernels: whether the Triton kernels compute; None for wherever they can. They do not know float64.

    Returns:
        A scalar or [L], float32 (float64 for float64): minus the sum of log p_ij over the pairs (i, j) of a group with
        i on this rank, divided by the pairs of all ranks; 0 without any pair.

        Its gradient is complete: what the words of this rank get in the loss of all ranks. That is right only if every
        rank gives its part the same upstream gradient, layer by layer.

    Raises:
        ValueError: a shape, dtype, device or the temperature is wrong.
    """
    check_call(words, groups, temperature, 1 if process_group is None else process_group.size())
    if use_kernels is None:
        use_kernels = runs_triton(words.device)
    path = contrastive_launch if use_kernels and words.dtype != torch.float64 else contrastive_chunked
    layers = words if words.dim() == 3 else words[None]
    loss: Tensor = _ContrastiveLoss.apply(
        layers.contiguous(), groups.group, groups.positives, groups.pairs, temperature, process_group, path
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
        path: ModuleType,
    ) -> Tensor:
        columns = _gather(words, process_group)
        first = 0 if process_group is None else process_group.rank() * words.shape[1]
        groups = WordGroups(group, positives, pairs)
        norms = inverse_norms(columns, group)
        similarities = Similarities(columns, norms, groups, first, words.shape[1], temperature)
        log_sums, positive_sums = path.row_sums(similarities)
        own = positives[similarities.own].to(log_sums.dtype)
        # two to the power of (logit - offset) is positives x p; inf makes that 0 for a word that is no anchor
        offsets = torch.where(own > 0, log_sums - own.log2(), float("inf"))
        offsets = _gather(offsets, process_group)
        ctx.save_for_backward(columns, norms, offsets, group, positives, pairs)
        ctx.first, ctx.anchors, ctx.temperature, ctx.path = first, words.shape[1], temperature, path
        return torch.where(own > 0, own * log_sums - positive_sums, 0).sum(-1) / LOG2_E / pairs.clamp(min=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        columns, inverse, offsets, *groups = ctx.saved_tensors
        groups = WordGroups(*groups)
        similarities = Similarities(columns, inverse, groups, ctx.first, ctx.anchors, ctx.temperature)
        scale = upstream / ctx.temperature / groups.pairs.clamp(min=1)
        return ctx.path.gradients(similarities, offsets, scale), None, None, None, None, None, None


def _gather(mine: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """[L, N, ...] of all ranks for [L, n, ...] of each, bit by bit."""
    if process_group is None or process_group.size() == 1:
        return mine
    ranks = process_group.size()
    # as bytes, because not every gloo knows bfloat16
    sent = mine.contiguous().view(torch.uint8)
    received = sent.new_empty((ranks * sent.shape[0], *sent.shape[1:]))
    dist.all_gather_into_tensor(received, sent, group=process_group)
    by_rank = received.view(mine.dtype).unflatten(0, (ranks, len(mine)))
    return by_rank.transpose(0, 1).flatten(1, 2).contiguous()
