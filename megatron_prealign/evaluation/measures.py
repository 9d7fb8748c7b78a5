"""How well words and their translations lie together: retrieval by cosine and by CSLS, and mean cosines.

CSLS (cross-domain similarity local scaling, Conneau et al. 2018, arXiv 1710.04087) is twice the cosine of two words
less the mean cosine of each to its 10 nearest words of the other language. A word that is near to everything is then
no longer everyone's nearest neighbour.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

MEASURES = ("p_at_1", "mrr", "p_at_1_csls", "mrr_csls", "positive_cosine", "negative_cosine")

_BLOCK_ROWS = 1024
_CSLS_NEIGHBOURS = 10
# Scores that are closer than this are a tie: rounding would decide between them (products of unit vectors in float32
# are off by some 1e-7).
_TIE = 1e-6

# One value for each source word and one for each target word.
Both = tuple[torch.Tensor, torch.Tensor]


class WordLinks:
    """Which words translate each other, for `measure_words`."""

    def __init__(self, links: NDArray[np.int64], device: torch.device) -> None:
        """
        Args:
            links: int64 `[pairs, 2]`, the numbers of a source word and of its translation; sorted, each pair once, and
                every word in at least one.
        """
        self._sources = links[:, 0]
        self.source, self.target = torch.from_numpy(links.T.copy()).to(device)

    def __len__(self) -> int:
        return len(self._sources)

    def blocks(self, words: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of `words` source words and of their links. The host knows them, no device need be asked."""
        starts = range(0, words, _BLOCK_ROWS)
        bounds = np.searchsorted(self._sources, [*starts, words]).tolist()
        for start, first, last in zip(starts, bounds, bounds[1:], strict=False):
            yield slice(start, min(start + _BLOCK_ROWS, words)), slice(first, last)


def measure_words(source: torch.Tensor, target: torch.Tensor, links: WordLinks) -> torch.Tensor:
    """All `MEASURES` of words and their translations, from source to target and back.

    Every word is asked for in turn, among all words of the other language. Its rank is that of its best translation: 1
    and the number of wrong words that score as well or better. So a tie counts against the model (one that gives all
    words the same state finds nothing), and so does a state that is not a number. `p_at_1` is the share of rank 1,
    `mrr` the mean of 1/rank. The two cosines are means over all translations and over all other pairs of words (NaN
    where there is no other pair); they are the same in both directions.

    No tensor is larger than 1,024 x words or words x hidden, and nothing waits for the device.

    Args:
        source, target: float32 `[words, hidden]` each; a state of zeros has cosine 0 to all.

    Returns:
        float64 `[2, len(MEASURES)]`: there and back.
    """
    source, target = F.normalize(source, dim=-1), F.normalize(target, dim=-1)
    link_cosine = (source[links.source] * target[links.target]).sum(dim=-1)
    near_source, near_target = _neighbourhoods(source, target, links)
    plain = (torch.zeros_like(near_source), torch.zeros_like(near_target))
    # Half of CSLS, which gives the same order; the asking word's own part moves all its scores alike.
    csls = (near_source / 2, near_target / 2)
    counts = _count_ahead(source, target, links, link_cosine, (plain, csls))
    cosines = _mean_cosines(source, target, link_cosine)
    return torch.stack(
        [torch.stack([*(value for count in counts for value in _p_and_mrr(count[way])), *cosines]) for way in (0, 1)]
    )


def _neighbourhoods(source: torch.Tensor, target: torch.Tensor, links: WordLinks) -> Both:
    """Mean cosine of each word to its nearest words of the other language."""
    of_source = []
    of_target = target.new_empty((0, len(target)))
    for rows, _ in links.blocks(len(source)):
        cosine = source[rows] @ target.t()
        of_source.append(cosine.topk(min(_CSLS_NEIGHBOURS, len(target)), dim=1).values.mean(dim=1))
        found = cosine.topk(min(_CSLS_NEIGHBOURS, len(cosine)), dim=0).values
        of_target = torch.cat([of_target, found])
        of_target = of_target.topk(min(_CSLS_NEIGHBOURS, len(of_target)), dim=0).values
    return torch.cat(of_source), of_target.mean(dim=0)


def _count_ahead(
    source: torch.Tensor,
    target: torch.Tensor,
    links: WordLinks,
    link_cosine: torch.Tensor,
    penalties: tuple[Both, ...],
) -> list[Both]:
    """For each word how many wrong words of the other language score as well as its best translation.

    Args:
        penalties: what a candidate's cosine loses; the words are counted once for each of these.
    """
    # What each asking word's best translation scores.
    best = [
        (
            _best(link_cosine - of_target[links.target], links.source, len(source)) - _TIE,
            _best(link_cosine - of_source[links.source], links.target, len(target)) - _TIE,
        )
        for of_source, of_target in penalties
    ]
    nothing = link_cosine.new_full((), -math.inf)
    asked_by_source: list[list[torch.Tensor]] = [[] for _ in penalties]
    asked_by_target = [torch.zeros(len(target), dtype=torch.int64, device=target.device) for _ in penalties]
    for rows, linked in links.blocks(len(source)):
        cosine = source[rows] @ target.t()
        # A translation is not wrong.
        cosine.index_put_((links.source[linked] - rows.start, links.target[linked]), nothing)
        for number, ((of_source, of_target), (best_target, best_source)) in enumerate(
            zip(penalties, best, strict=True)
        ):
            # Written as not-below, so that what is not a number counts as ahead.
            asked_by_source[number].append((~(cosine - of_target < best_target[rows, None])).sum(dim=1))
            asked_by_target[number] += (~(cosine - of_source[rows, None] < best_source)).sum(dim=0)
    return [(torch.cat(one), other) for one, other in zip(asked_by_source, asked_by_target, strict=True)]


def _best(score: torch.Tensor, word: torch.Tensor, words: int) -> torch.Tensor:
    """The highest score of each word's links."""
    return score.new_full((words,), -math.inf).scatter_reduce(0, word, score, "amax")


def _p_and_mrr(ahead: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (ahead == 0).double().mean(), (1.0 / (1.0 + ahead.double())).mean()


def _mean_cosines(source: torch.Tensor, target: torch.Tensor, link_cosine: torch.Tensor) -> list[torch.Tensor]:
    """Of translations and of all other pairs. The sum over all pairs is the product of the sums."""
    linked = link_cosine.sum(dtype=torch.float64)
    every = source.sum(dim=0, dtype=torch.float64) @ target.sum(dim=0, dtype=torch.float64)
    others = len(source) * len(target) - len(link_cosine)
    rest = (every - linked) / others if others else torch.full_like(every, math.nan)
    return [linked / len(link_cosine), rest]
