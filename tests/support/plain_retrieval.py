"""Plain implementation of the word retrieval metrics: float64, one word at a time, no blocks."""

import math
from collections.abc import Sequence
from typing import Any

import torch

# Scores closer than this are ties in the package; float64 would distinguish them.
TIE = 1e-6


def _retrieval(cosine: torch.Tensor, correct: list[set[int]], penalty: torch.Tensor) -> tuple[float, float]:
    """P@1 and MRR of the rows of `cosine`."""
    first, reciprocal = 0, 0.0
    for row, answers in enumerate(correct):
        scores = [cosine[row, column].item() - penalty[column].item() for column in range(cosine.shape[1])]
        best = max(scores[column] for column in answers)
        ahead = sum(scores[column] >= best - TIE for column in range(len(scores)) if column not in answers)
        first += ahead == 0
        reciprocal += 1 / (1 + ahead)
    return first / len(correct), reciprocal / len(correct)


def _mean_of_nearest(row: torch.Tensor) -> float:
    values = sorted(row.tolist(), reverse=True)[:10]
    return sum(values) / len(values)


def plain_metrics(
    source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], links: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics from source to target and back, from the state `[hidden]` of each word."""
    directions = []
    for one, other, pairs in ((source, target, links), (target, source, [(b, a) for a, b in links])):
        queries, candidates = (torch.nn.functional.normalize(torch.stack(list(each)).double()) for each in (one, other))
        cosine = queries @ candidates.t()
        correct: list[set[int]] = [set() for _ in one]
        for query, answer in pairs:
            correct[query].add(answer)
        penalty = torch.tensor([_mean_of_nearest(column) / 2 for column in cosine.t()])
        positive = [cosine[query, answer].item() for query, answers in enumerate(correct) for answer in answers]
        negative = [
            cosine[query, answer].item()
            for query, answers in enumerate(correct)
            for answer in range(len(other))
            if answer not in answers
        ]
        p_at_1, mrr = _retrieval(cosine, correct, torch.zeros(len(other)))
        p_at_1_csls, mrr_csls = _retrieval(cosine, correct, penalty)
        directions.append(
            {
                "p_at_1": p_at_1,
                "mrr": mrr,
                "p_at_1_csls": p_at_1_csls,
                "mrr_csls": mrr_csls,
                "positive_cosine": sum(positive) / len(positive),
                "negative_cosine": sum(negative) / len(negative) if negative else math.nan,
            }
        )
    return directions[0], directions[1]
