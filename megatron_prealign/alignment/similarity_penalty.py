"""Similarity penalty, minimised by the alignment phase in addition to the contrastive loss of `kernels.contrastive`."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megatron_prealign.kernels import WordGroups


def similarity_penalty(own: torch.Tensor, groups: WordGroups, group: dist.ProcessGroup) -> torch.Tensor:
    """`max(0, mean over i != j of s_ij)` of the cosine similarities of all words of all ranks, a float32 scalar.

    Every rank gets the value, and the gradient for its own words. Collective: call on all ranks of `group`.

    Args:
        own: this rank's words `[n, hidden]`; those of rank r are `groups.group[r * n : (r + 1) * n]`.
    """
    valid = (groups.group >= 0).float()
    first = group.rank() * own.shape[0]
    unit = _unit(own.float()) * valid[first : first + own.shape[0], None]
    # All-reduce in forward, identity in backward; works for any group, not only the tensor-parallel one.
    parts = torch.cat([unit.sum(dim=0), unit.detach().square().sum()[None]])
    total, diagonal = reduce_from_tensor_model_parallel_region(parts, group=group).split([own.shape[1], 1])
    words = valid.sum()
    # The sum over all pairs, i = j included, is the square of the summed vectors. The diagonal is summed rather than
    # counted, since a word of length 0 has similarity 0 even to itself.
    mean = (total.square().sum() - diagonal[0]) / (words * (words - 1)).clamp(min=1.0)
    return mean.clamp(min=0.0)


def _unit(words: torch.Tensor) -> torch.Tensor:
    """Scales words to unit length; words of length 0 stay 0 and get no gradient."""
    square = words.square().sum(dim=-1, keepdim=True)
    return words * torch.where(square > 0, square, torch.inf).rsqrt()
