"""Joins lists over a language that they share: German–English and English–Russian become German–Russian.

A pivot word of several meanings makes wrong pairs: Ufer → bank → банк. So a joined pair is kept if two pivot words or
more lead from the one word to the other, or if its only pivot word has a single translation in the target language.

Its weight is the sum over the pivot words of the shares that the two steps have: the weight of the step among all steps
from that word into that language.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.groups import MULTI_WORD_SOURCE, Groups, group_pairs
from megatron_prealign.dictionary.ragged import offsets_of, row_indices, row_numbers
from megatron_prealign.errors import UserError

MOST_TRANSLATIONS = 50

BRIDGE = "pairs that served as a bridge of the pivot"
WIDE = f"steps over a pivot word with more than {MOST_TRANSLATIONS} translations on one side"
JOINED = "pairs joined over the pivot"
AMBIGUOUS = "joined pairs that only one pivot word of several meanings supports"
KNOWN = "joined pairs that are there without the pivot"


def join_over(
    groups: Groups, language: str, rules: Counter[str], *, keep_ambiguous: bool = False, keep_bridge: bool = False
) -> Groups:
    """The groups with the pairs joined over `language` behind those that are there.

    Args:
        groups: of lists that end in the pivot language and of lists that begin with it.
        language: the pivot.
        rules: gets the counts.
        keep_ambiguous: keep joined pairs that only one pivot word of several meanings supports.
        keep_bridge: keep also the pairs of the pivot language.

    Raises:
        UserError: no list ends in the language, or none begins with it.
    """
    pivot = groups.languages.index(language) if language in groups.languages else -1
    source, target = groups.source[groups.pair_group].astype(np.int64), groups.pair_target.astype(np.int64)
    weight = groups.pair_weight.astype(np.float64)
    from_pivot, to_pivot = (groups.text_language[texts] == pivot for texts in (source, target))
    for side, example, what in ((to_pivot, f"xx-{language}", "ends in"), (from_pivot, f"{language}-xx", "begins with")):
        if not side.any():
            raise UserError(
                f"--pivot {language}: no pair of the lists {what} {language} ({example}); add such a list, or turn one "
                "around with --source"
            )
    left, right = np.flatnonzero(to_pivot), np.flatnonzero(from_pivot)
    rules[BRIDGE] += len(left) + len(right)
    joined = _join(
        (source[left], target[left], weight[left]), (source[right], target[right], weight[right]), groups, rules
    )
    kept = joined.support > 1
    if not keep_ambiguous:
        kept |= joined.plain
        rules[AMBIGUOUS] += int((~kept).sum())
    else:
        kept[:] = True
    rules[JOINED] += int(kept.sum())
    stay = ~(to_pivot | from_pivot)
    if keep_bridge:
        # Alignment and switching need single words, which a bridge does not.
        phrase = from_pivot & np.array([" " in groups.texts[text] for text in source.tolist()], dtype=bool)
        rules[MULTI_WORD_SOURCE] += int(phrase.sum())
        stay = ~phrase
    result, known = group_pairs(
        groups.languages,
        groups.texts,
        groups.text_language,
        np.concatenate([source[stay], joined.source[kept]]),
        np.concatenate([target[stay], joined.target[kept]]),
        np.concatenate([weight[stay], joined.weight[kept]]).astype(np.float32),
    )
    rules[KNOWN] += known
    return result


class _Joined:
    """Joined pairs, each once, by first mention of their source word and then the heaviest first."""

    def __init__(
        self,
        source: NDArray[np.int64],
        target: NDArray[np.int64],
        path_weight: NDArray[np.float64],
        plain: NDArray[np.bool_],
        texts: int,
    ) -> None:
        """Of the paths: their ends, their weight and whether the pivot word has one translation."""
        pairs, first, number = np.unique(source * texts + target, return_index=True, return_inverse=True)
        weight = np.bincount(number, weights=path_weight, minlength=len(pairs))
        support = np.bincount(number, minlength=len(pairs))
        is_plain = np.bincount(number, weights=plain, minlength=len(pairs)) > 0
        source, target = pairs // max(texts, 1), pairs % max(texts, 1)
        mention = np.full(texts, len(number), dtype=np.int64)
        np.minimum.at(mention, source, first)
        order = np.lexsort((first, -weight, mention[source]))
        self.source, self.target = source[order], target[order]
        self.weight = weight[order]
        self.support, self.plain = support[order], is_plain[order]


_Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


def _join(left: _Pairs, right: _Pairs, groups: Groups, rules: Counter[str]) -> _Joined:
    """Every pair of `left` (word, pivot word, weight) with every pair of `right` (pivot word, word, weight)."""
    texts, language = len(groups.texts), groups.text_language
    order = np.argsort(right[0], kind="stable")
    right = _take(right, order)
    to_pivot, from_word = _Steps(left[1], language[left[0]], left[2]), _Steps(left[0], language[left[1]], left[2])
    from_pivot = _Steps(right[0], language[right[1]], right[2])
    before_share = left[2] / from_word.weight[from_word.number]
    after_share = right[2] / from_pivot.weight[from_pivot.number]
    single = from_pivot.count[from_pivot.number] == 1
    # Before the join: two words of thousands of translations would make millions of steps.
    narrow = [np.flatnonzero(steps.count[steps.number] <= MOST_TRANSLATIONS) for steps in (to_pivot, from_pivot)]
    steps = int(np.bincount(right[0], minlength=texts)[left[1]].sum())
    left, before_share = _take(left, narrow[0]), before_share[narrow[0]]
    right, after_share, single = _take(right, narrow[1]), after_share[narrow[1]], single[narrow[1]]
    index, offsets = row_indices(offsets_of(np.bincount(right[0], minlength=texts)), left[1])
    rules[WIDE] += steps - len(index)
    path = row_numbers(offsets)
    # A word leads back to itself and to its synonyms where there are lists in both directions.
    good = language[left[0]][path] != language[right[1]][index]
    path, index = path[good], index[good]
    share = before_share[path] * after_share[index]
    return _Joined(left[0][path], right[1][index], share, single[index], texts)


def _take(pairs: _Pairs, chosen: NDArray[np.int64]) -> _Pairs:
    return pairs[0][chosen], pairs[1][chosen], pairs[2][chosen]


class _Steps:
    """The steps from words into languages: `number` of each step's word and language, and by it how many and how heavy
    they are."""

    def __init__(self, words: NDArray[np.int64], language: NDArray[np.int16], weight: NDArray[np.float64]) -> None:
        _, self.number = np.unique(words * (int(language.max(initial=0)) + 1) + language, return_inverse=True)
        self.count = np.bincount(self.number)
        self.weight = np.bincount(self.number, weights=weight)
