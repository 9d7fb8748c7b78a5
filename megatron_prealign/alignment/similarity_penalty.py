"""What the alignment phase minimises beside the contrastive loss of `kernels.contrastive`: the similarity penalty."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

from megatron_prealign.kernels import WordGroups


def similarity_penalty(own: torch.Tensor, groups: WordGroups, group: dist.ProcessGroup) -> torch.Tensor:
    """`max(0, mean over i != j of s_ij)` of the cosine similarities of all words of all ranks, a float32 scalar.

    Every rank gets the value; the gradient of each is that of its own words. Takes part: all ranks of `group`.

    Args:
        own: this rank's words `[n, hidden]`; those of rank r are `groups.group[r * n : (r + 1) * n]`.
    """
    valid = (groups.group >= 0).float()
    first = group.rank() * own.shape[0]
    unit = _unit(own.float()) * valid[first : first + own.shape[0], None]
    # Sums over ranks forward and hands the gradient on backward, over whatever group it is given.
    parts = torch.cat([unit.sum(dim=0), unit.detach().square().sum()[None]])
    total, themselves = reduce_from_tensor_model_parallel_region(parts, group=group).split([own.shape[1], 1])
    words = valid.sum()
    # The sum over all pairs, i = j included, is the square of the summed vectors. A word of length 0 is like no word,
    # not even itself.
    mean = (total.square().sum() - themselves[0]) / (words * (words - 1)).clamp(min=1.0)
    return mean.clamp(min=0.0)


def _unit(words: torch.Tensor) -> torch.Tensor:
    """Words of length one; those of length 0 stay, without a gradient."""
    square = words.square().sum(dim=-1, keepdim=True)
    return words * torch.where(square > 0, square, torch.inf).rsqrt()
