"""The contrastive objective of the alignment phase (PreAlign, arXiv 2407.16222, mended).

Multi-positive InfoNCE over the words of the whole global batch: the anchors are this rank's words, the candidates are
the words of every data-parallel rank. Each rank returns its anchors' part; the parts of all ranks sum to the loss.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


@dataclass(frozen=True)
class WordGroups:
    """Which words of the global batch mean the same, the same on every rank.

    Attributes:
        every: group of each word slot of all ranks, int64 `[ranks * slots]`, -1 for an empty slot; rank order.
        own: the part of `every` that belongs to this rank, int64 `[slots]`.
        pairs: ordered pairs (i, j), i != j, of the same group in the global batch, a float scalar on the device.
    """

    every: torch.Tensor
    own: torch.Tensor
    pairs: torch.Tensor


def gather_words(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`[slots, hidden]` of every rank as `[ranks * slots, hidden]`; backward sums over ranks and gives each its
    part."""
    if group.size() == 1:
        return own
    # The very operation sequence parallelism needs along its first dimension, over another group.
    return gather_from_sequence_parallel_region(own, tensor_parallel_output_grad=True, group=group)


def contrastive_loss(
    own: torch.Tensor,
    groups: WordGroups,
    *,
    temperature: float,
    group: dist.ProcessGroup,
    with_penalty: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """This rank's parts of the contrastive loss of one layer and of the similarity penalty, float32 scalars.

    The sum over ranks is the loss. Takes part: all ranks of the data-parallel `group`.

    Args:
        own: word representations of this rank, `[slots, hidden]`; rows of empty slots are ignored.
        temperature: divides the cosine similarities.
        with_penalty: also return the penalty on a positive mean similarity over all pairs of different words.
    """
    unit = F.normalize(own.float(), dim=-1)
    every = gather_words(unit, group)
    rank, slots = group.rank(), own.shape[0]
    anchor = torch.arange(rank * slots, (rank + 1) * slots, device=own.device)
    is_self = anchor[:, None] == torch.arange(every.shape[0], device=own.device)[None, :]
    left_out = is_self | (groups.every < 0)[None, :]
    similarity = unit @ every.t() / temperature
    log_normaliser = torch.logsumexp(similarity.masked_fill(left_out, float("-inf")), dim=1)
    positive = (groups.own[:, None] == groups.every[None, :]) & ~left_out & (groups.own >= 0)[:, None]
    log_probability = similarity - log_normaliser[:, None]
    # An anchor all alone in the batch has a normaliser of log 0, but no positive: it is masked out, not multiplied.
    loss = -torch.where(positive, log_probability, 0.0).sum() / groups.pairs.clamp(min=1.0)
    return loss, _mean_similarity_penalty(every, groups, ranks=group.size()) if with_penalty else None


def _mean_similarity_penalty(every: torch.Tensor, groups: WordGroups, *, ranks: int) -> torch.Tensor:
    """This rank's share of `max(0, mean over i != j of s_ij)`: every rank computes the same value and gives 1/ranks of
    it."""
    valid = (groups.every >= 0).float()
    words = valid.sum()
    total = (every * valid[:, None]).sum(dim=0)
    mean = (total.square().sum() - words) / (words * (words - 1)).clamp(min=1.0)
    return mean.clamp(min=0.0) / ranks
