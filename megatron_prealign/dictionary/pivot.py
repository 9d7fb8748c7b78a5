"""Joins lists over a common pivot language: German–English and English–Russian become German–Russian.

An ambiguous pivot word produces wrong pairs: Ufer → bank → банк. A joined pair is therefore kept only if two or more
pivot words connect its words, or if its only pivot word has a single translation in the target language.

The weight of a joined pair is the sum over its pivot words of the product of both step fractions. A step fraction is
the weight of the step divided by the weight of all steps from that word into that language.
"""

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.groups import MULTI_WORD_SOURCE, Groups, group_pairs
from megatron_prealign.dictionary.ragged import offsets_of, row_indices, row_numbers
from megatron_prealign.errors import UserError

MOST_TRANSLATIONS = 50

BRIDGE = "pairs of the pivot language, used only for joining"
WIDE = f"joins through a pivot word with more than {MOST_TRANSLATIONS} translations on one side"
JOINED = "pairs joined through the pivot"
AMBIGUOUS = "joined pairs supported by a single ambiguous pivot word"
KNOWN = "joined pairs that the lists already contain"


def join_over(
    groups: Groups, language: str, rules: Counter[str], *, keep_ambiguous: bool = False, keep_bridge: bool = False
) -> Groups:
    """Joins pairs over `language`; direct pairs come first, joined pairs after them.

    Args:
        groups: groups of lists that end in the pivot language and of lists that start with it.
        language: the pivot language.
        rules: updated with the counts.
        keep_ambiguous: keep joined pairs supported by only one ambiguous pivot word.
        keep_bridge: also keep the pairs of the pivot language.

    Raises:
        UserError: no list ends in the pivot language, or none starts with it.
    """
    pivot = groups.languages.index(language) if language in groups.languages else -1
    source, target = groups.source[groups.pair_group].astype(np.int64), groups.pair_target.astype(np.int64)
    weight = groups.pair_weight.astype(np.float64)
    from_pivot, to_pivot = (groups.text_language[texts] == pivot for texts in (source, target))
    for side, example, role in ((to_pivot, f"xx-{language}", "target"), (from_pivot, f"{language}-xx", "source")):
        if not side.any():
            raise UserError(
                f"--pivot {language}: no list has {language} as its {role} ({example}); add such a list, or reverse "
                "one with --source"
            )
    left, right = np.flatnonzero(to_pivot), np.flatnonzero(from_pivot)
    rules[BRIDGE] += len(left) + len(right)
    joined = _join(
        (source[left], target[left], weight[left]), (source[right], target[right], weight[right]), groups, rules
    )
    kept = joined.support > 1
    if not keep_ambiguous:
        kept |= joined.unambiguous
        rules[AMBIGUOUS] += int((~kept).sum())
    else:
        kept[:] = True
    rules[JOINED] += int(kept.sum())
    remaining = ~(to_pivot | from_pivot)
    if keep_bridge:
        # Phrases are allowed as pivots, but alignment and switching need single source words.
        phrase = from_pivot & np.array([" " in groups.texts[text] for text in source.tolist()], dtype=bool)
        rules[MULTI_WORD_SOURCE] += int(phrase.sum())
        remaining = ~phrase
    result, known = group_pairs(
        groups.languages,
        groups.texts,
        groups.text_language,
        np.concatenate([source[remaining], joined.source[kept]]),
        np.concatenate([target[remaining], joined.target[kept]]),
        np.concatenate([weight[remaining], joined.weight[kept]]).astype(np.float32),
    )
    rules[KNOWN] += known
    return result


class _JoinedPairs:
    """Unique joined pairs, sorted by first occurrence of the source word, then by descending weight."""

    def __init__(
        self,
        source: NDArray[np.int64],
        target: NDArray[np.int64],
        path_weight: NDArray[np.float64],
        unambiguous: NDArray[np.bool_],
        texts: int,
    ) -> None:
        """Merges the paths with the same end points.

        Args:
            source: text index of each path's start.
            target: text index of each path's end.
            path_weight: weight of each path.
            unambiguous: whether the pivot word of each path has a single translation.
            texts: number of texts.
        """
        pairs, first, number = np.unique(source * texts + target, return_index=True, return_inverse=True)
        weight = np.bincount(number, weights=path_weight, minlength=len(pairs))
        support = np.bincount(number, minlength=len(pairs))
        any_unambiguous = np.bincount(number, weights=unambiguous, minlength=len(pairs)) > 0
        source, target = pairs // max(texts, 1), pairs % max(texts, 1)
        occurrence = np.full(texts, len(number), dtype=np.int64)
        np.minimum.at(occurrence, source, first)
        order = np.lexsort((first, -weight, occurrence[source]))
        self.source, self.target = source[order], target[order]
        self.weight = weight[order]
        self.support, self.unambiguous = support[order], any_unambiguous[order]


_Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]


def _join(left: _Pairs, right: _Pairs, groups: Groups, rules: Counter[str]) -> _JoinedPairs:
    """Joins every pair of `left` (word, pivot word, weight) with every pair of `right` (pivot word, word, weight)."""
    texts, language = len(groups.texts), groups.text_language
    order = np.argsort(right[0], kind="stable")
    right = _take(right, order)
    to_pivot, from_word = _Steps(left[1], language[left[0]], left[2]), _Steps(left[0], language[left[1]], left[2])
    from_pivot = _Steps(right[0], language[right[1]], right[2])
    left_fraction = left[2] / from_word.weight[from_word.number]
    right_fraction = right[2] / from_pivot.weight[from_pivot.number]
    single = from_pivot.count[from_pivot.number] == 1
    # Filter before the join: two words with thousands of translations would produce millions of paths.
    narrow = [np.flatnonzero(steps.count[steps.number] <= MOST_TRANSLATIONS) for steps in (to_pivot, from_pivot)]
    steps = int(np.bincount(right[0], minlength=texts)[left[1]].sum())
    left, left_fraction = _take(left, narrow[0]), left_fraction[narrow[0]]
    right, right_fraction, single = _take(right, narrow[1]), right_fraction[narrow[1]], single[narrow[1]]
    index, offsets = row_indices(offsets_of(np.bincount(right[0], minlength=texts)), left[1])
    rules[WIDE] += steps - len(index)
    path = row_numbers(offsets)
    # With lists in both directions, a word would be joined with itself and its synonyms.
    good = language[left[0]][path] != language[right[1]][index]
    path, index = path[good], index[good]
    weight = left_fraction[path] * right_fraction[index]
    return _JoinedPairs(left[0][path], right[1][index], weight, single[index], texts)


def _take(pairs: _Pairs, chosen: NDArray[np.int64]) -> _Pairs:
    return pairs[0][chosen], pairs[1][chosen], pairs[2][chosen]


class _Steps:
    """Steps from words into languages: `number` identifies the word and language of each step; `count` and `weight` are
    totals per number."""

    def __init__(self, words: NDArray[np.int64], language: NDArray[np.int16], weight: NDArray[np.float64]) -> None:
        _, self.number = np.unique(words * (int(language.max(initial=0)) + 1) + language, return_inverse=True)
        self.count = np.bincount(self.number)
        self.weight = np.bincount(self.number, weights=weight)
