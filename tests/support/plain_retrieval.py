"""The measures of word retrieval written plainly: float64, one word at a time, no blocks."""

import math
from collections.abc import Sequence
from typing import Any

import torch

# Scores that the product cannot tell apart; float64 can, so the plain version must be told.
TIE = 1e-6


def _asked(cosine: torch.Tensor, right: list[set[int]], penalty: torch.Tensor) -> tuple[float, float]:
    """P@1 and MRR of the rows of `cosine`."""
    first, reciprocal = 0, 0.0
    for row, answers in enumerate(right):
        scores = [cosine[row, column].item() - penalty[column].item() for column in range(cosine.shape[1])]
        best = max(scores[column] for column in answers)
        ahead = sum(scores[column] >= best - TIE for column in range(len(scores)) if column not in answers)
        first += ahead == 0
        reciprocal += 1 / (1 + ahead)
    return first / len(right), reciprocal / len(right)


def _near(row: torch.Tensor) -> float:
    values = sorted(row.tolist(), reverse=True)[:10]
    return sum(values) / len(values)


def plain_measures(
    source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], links: Any
) -> tuple[dict[str, float], dict[str, float]]:
    """There and back, of states `[hidden]` of each word."""
    ways = []
    for one, other, pairs in ((source, target, links), (target, source, [(b, a) for a, b in links])):
        asking, candidates = (torch.nn.functional.normalize(torch.stack(list(each)).double()) for each in (one, other))
        cosine = asking @ candidates.t()
        right: list[set[int]] = [set() for _ in one]
        for asked, answer in pairs:
            right[asked].add(answer)
        penalty = torch.tensor([_near(column) / 2 for column in cosine.t()])
        found = [cosine[asked, answer].item() for asked, answers in enumerate(right) for answer in answers]
        rest = [
            cosine[asked, answer].item()
            for asked, answers in enumerate(right)
            for answer in range(len(other))
            if answer not in answers
        ]
        p_at_1, mrr = _asked(cosine, right, torch.zeros(len(other)))
        p_at_1_csls, mrr_csls = _asked(cosine, right, penalty)
        ways.append(
            {
                "p_at_1": p_at_1,
                "mrr": mrr,
                "p_at_1_csls": p_at_1_csls,
                "mrr_csls": mrr_csls,
                "positive_cosine": sum(found) / len(found),
                "negative_cosine": sum(rest) / len(rest) if rest else math.nan,
            }
        )
    return ways[0], ways[1]
