"""Slow reference implementations of the losses, written as in their definitions."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def contrastive_loops(
    words: torch.Tensor, groups: list[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Contrastive loss of one layer by two loops in float64: loss, similarity penalty, ordered positive pairs.

    Args:
        words: `[slots, hidden]`.
        groups: Group of each slot, -1 for an empty slot.
    """
    words = words.double()
    valid = [index for index, group in enumerate(groups) if group >= 0]
    unit = {index: words[index] / words[index].norm() for index in valid}
    zero = torch.zeros((), dtype=torch.float64)
    total, similarity, pairs, ordered = zero, zero, 0, 0
    for i in valid:
        cosine = {a: unit[i] @ unit[a] for a in valid if a != i}
        denominator = sum((torch.exp(value / temperature) for value in cosine.values()), zero)
        for j, value in cosine.items():
            similarity, ordered = similarity + value, ordered + 1
            if groups[i] == groups[j]:
                total, pairs = total - torch.log(torch.exp(value / temperature) / denominator), pairs + 1
    return total / max(pairs, 1), (similarity / max(ordered, 1)).clamp(min=0.0), pairs


def contrastive_matrix(
    words: torch.Tensor, groups: Sequence[int], temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`contrastive_loops` without loops, for larger numbers of words: loss and similarity penalty.

    Args:
        words: `[words, hidden]`, without empty slots.
    """
    words, group = words.double(), torch.tensor(groups)
    unit = words / words.norm(dim=1, keepdim=True)
    other = ~torch.eye(len(groups), dtype=torch.bool)
    cosine = unit @ unit.t()
    logits = (cosine / temperature).masked_fill(~other, float("-inf"))
    positive = (group[:, None] == group[None, :]) & other
    loss = -logits.log_softmax(dim=1)[positive].sum() / max(int(positive.sum()), 1)
    return loss, cosine[other].mean().clamp(min=0.0) if len(groups) > 1 else torch.zeros(())


def next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, vocab_size: int | None = None
) -> torch.Tensor:
    """Mean cross entropy in float64 over the positions where `mask` is not 0.

    Args:
        logits: `[samples, sequence, vocabulary]`, including padded columns unless `vocab_size` cuts them off.
        labels: `[samples, sequence]`.
        mask: `[samples, sequence]`.
    """
    logits = logits[..., :vocab_size].double()
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum()
