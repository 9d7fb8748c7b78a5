"""Definition of the contrastive loss in eager torch: all similarities at once, gradients by autograd."""

import torch
from torch import Tensor

from megatron_prealign.kernels.contrastive_interface import WordGroups, check_call, compute_dtype


def contrastive_loss_reference(words: Tensor, groups: WordGroups, *, temperature: float) -> Tensor:
    """The loss over the words of all ranks on one rank: minus the mean of log p_ij over all pairs (i, j) of a group,
    where p_ij is the softmax of cosine / temperature over all other words. Materialises N x N tensors.

    Args:
        words: [N, H] or [L, N, H] of float32, bfloat16 (computed in float32) or float64.
        groups: groups of these N words.
        temperature: above 0.

    Returns:
        A scalar or [L], float32 or float64.

    Raises:
        ValueError: a shape, dtype, device or the temperature is wrong.
    """
    check_call(words, groups, temperature, ranks=1)
    words = words.to(compute_dtype(words.dtype))
    group = groups.group
    square = (words * words).sum(-1, keepdim=True)
    # a word of norm 0 has cosine 0 to all words and gradient 0; the inner where keeps its gradient from being NaN
    unit = torch.where(square > 0, words / torch.where(square > 0, square, 1).sqrt(), 0)
    other = ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    candidate = other & (group >= 0)
    positive = candidate & (group[:, None] == group)
    logits = (unit @ unit.mT / temperature).masked_fill(~candidate, float("-inf"))
    # a row without candidates is NaN, but it has no positives either
    log_p = torch.log_softmax(logits, dim=-1)
    return -torch.where(positive, log_p, 0).sum((-2, -1)) / groups.pairs.clamp(min=1)
