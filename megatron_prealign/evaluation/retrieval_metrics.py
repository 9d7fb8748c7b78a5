"""Word-retrieval metrics: P@1 and MRR by cosine and by CSLS, and mean cosines.

CSLS (cross-domain similarity local scaling, Conneau et al. 2018, arXiv 1710.04087) is twice the cosine of two words
minus the mean cosine of each word to its 10 nearest words in the other language. This prevents hubs, words that are
close to everything, from being the nearest neighbour of every word.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

METRICS = ("p_at_1", "mrr", "p_at_1_csls", "mrr_csls", "positive_cosine", "negative_cosine")

_BLOCK_ROWS = 1024
_CSLS_NEIGHBOURS = 10
# Scores that differ by less than this are a tie, because rounding would decide between them (errors of dot products of
# unit vectors in float32 are about 1e-7).
_TIE = 1e-6

# (one value per source word, one value per target word)
WordValues = tuple[torch.Tensor, torch.Tensor]


class WordLinks:
    """Pairs of words that are translations of each other, for `measure_words`."""

    def __init__(self, links: NDArray[np.int64], device: torch.device) -> None:
        """
        Args:
            links: int64 `[pairs, 2]`, indices of a source word and of its translation; sorted, without duplicates, and
                with every word in at least one pair.
        """
        self._sources = links[:, 0]
        self.source, self.target = torch.from_numpy(links.T.copy()).to(device)

    def __len__(self) -> int:
        return len(self._sources)

    def blocks(self, words: int) -> Iterator[tuple[slice, slice]]:
        """Yields blocks of the `words` source words and of their links, without synchronising with the device."""
        starts = range(0, words, _BLOCK_ROWS)
        bounds = np.searchsorted(self._sources, [*starts, words]).tolist()
        for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
            yield slice(start, min(start + _BLOCK_ROWS, words)), slice(first, last)


def measure_words(source: torch.Tensor, target: torch.Tensor, links: WordLinks) -> torch.Tensor:
    """Computes all `METRICS` of words and their translations, from source to target and from target to source.

    Every word queries all words of the other language. The rank of its best translation is 1 + the number of wrong
    words that score at least as high. A tie therefore counts against the model (P@1 is 0 if all words have the same
    state), and so does NaN. `p_at_1` is the fraction of queries with rank 1, `mrr` the mean of 1/rank. The two cosines
    are means over all translation pairs and over all other pairs of words (NaN if there are none); they are the same in
    both directions.

    No tensor is larger than 1,024 x words or words x hidden, and nothing synchronises with the device.

    Args:
        source, target: float32 `[words, hidden]` each; a zero state has cosine 0 to all others.

    Returns:
        float64 `[2, len(METRICS)]`: source to target, target to source.
    """
    source, target = F.normalize(source, dim=-1), F.normalize(target, dim=-1)
    link_cosine = (source[links.source] * target[links.target]).sum(dim=-1)
    near_source, near_target = _neighbourhoods(source, target, links)
    plain = (torch.zeros_like(near_source), torch.zeros_like(near_target))
    # Half of CSLS without the query's own term: that shifts all scores of a query equally, so the order is the same.
    csls = (near_source / 2, near_target / 2)
    counts = _count_ahead(source, target, links, link_cosine, (plain, csls))
    cosines = _mean_cosines(source, target, link_cosine)
    return torch.stack(
        [
            torch.stack([*(value for count in counts for value in _p_and_mrr(count[direction])), *cosines])
            for direction in (0, 1)
        ]
    )


def _neighbourhoods(source: torch.Tensor, target: torch.Tensor, links: WordLinks) -> WordValues:
    """Mean cosine of each word to its nearest words in the other language."""
    of_source = []
    of_target = target.new_empty((0, len(target)))
    for rows, _ in links.blocks(len(source)):
        cosine = source[rows] @ target.t()
        of_source.append(cosine.topk(min(_CSLS_NEIGHBOURS, len(target)), dim=1).values.mean(dim=1))
        nearest = cosine.topk(min(_CSLS_NEIGHBOURS, len(cosine)), dim=0).values
        of_target = torch.cat([of_target, nearest])
        of_target = of_target.topk(min(_CSLS_NEIGHBOURS, len(of_target)), dim=0).values
    return torch.cat(of_source), of_target.mean(dim=0)


def _count_ahead(
    source: torch.Tensor,
    target: torch.Tensor,
    links: WordLinks,
    link_cosine: torch.Tensor,
    penalties: tuple[WordValues, ...],
) -> list[WordValues]:
    """Counts for each word the wrong words of the other language that score at least as high as its best translation.

    Args:
        penalties: Values subtracted from the cosine of each candidate; the words are counted once per entry.
    """
    # Score of the best translation of each query, with a margin for ties.
    best = [
        (
            _best(link_cosine - of_target[links.target], links.source, len(source)) - _TIE,
            _best(link_cosine - of_source[links.source], links.target, len(target)) - _TIE,
        )
        for of_source, of_target in penalties
    ]
    lowest = link_cosine.new_full((), -math.inf)
    source_counts: list[list[torch.Tensor]] = [[] for _ in penalties]
    target_counts = [torch.zeros(len(target), dtype=torch.int64, device=target.device) for _ in penalties]
    for rows, linked in links.blocks(len(source)):
        cosine = source[rows] @ target.t()
        # Exclude translations, which must not count as wrong words.
        cosine.index_put_((links.source[linked] - rows.start, links.target[linked]), lowest)
        for number, ((of_source, of_target), (best_target, best_source)) in enumerate(
            zip(penalties, best, strict=True)
        ):
            # "Not below" rather than "at least", so that NaN counts as ahead.
            source_counts[number].append((~(cosine - of_target < best_target[rows, None])).sum(dim=1))
            target_counts[number] += (~(cosine - of_source[rows, None] < best_source)).sum(dim=0)
    return [(torch.cat(one), other) for one, other in zip(source_counts, target_counts, strict=True)]


def _best(score: torch.Tensor, word: torch.Tensor, words: int) -> torch.Tensor:
    """Highest score over the links of each word."""
    return score.new_full((words,), -math.inf).scatter_reduce(0, word, score, "amax")


def _p_and_mrr(ahead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (ahead == 0).double().mean(), (1.0 / (1.0 + ahead.double())).mean()


def _mean_cosines(source: torch.Tensor, target: torch.Tensor, link_cosine: torch.Tensor) -> list[torch.Tensor]:
    """Mean cosine over translations and over all other pairs. The sum over all pairs is the product of the sums."""
    linked_sum = link_cosine.sum(dtype=torch.float64)
    total = source.sum(dim=0, dtype=torch.float64) @ target.sum(dim=0, dtype=torch.float64)
    others = len(source) * len(target) - len(link_cosine)
    other_mean = (total - linked_sum) / others if others else torch.full_like(total, math.nan)
    return [linked_sum / len(link_cosine), other_mean]


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are not None; None without such values."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None
