"""Selects and orders the pairs of a table: rules that need no tokens."""

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.groups import Groups
from megatron_prealign.dictionary.running_words import WordCounts, occurrences
from megatron_prealign.errors import UserError

RARE_SOURCE = "pairs whose source occurs too rarely in the corpora"
RARE_TARGET = "pairs whose translation occurs too rarely in the corpora"


def keep_pairs(groups: Groups, keep: NDArray[np.bool_]) -> Groups:
    """Returns the groups with only the pairs `keep` (bool `[P]`); drops empty groups, keeps `texts` unchanged."""
    kept = np.flatnonzero(keep)
    remaining, pair_group = np.unique(groups.pair_group[kept], return_inverse=True)
    return replace(
        groups,
        source=groups.source[remaining],
        pair_group=pair_group.astype(np.int32),
        pair_target=groups.pair_target[kept],
        pair_weight=groups.pair_weight[kept],
    )


def drop_rare(
    groups: Groups, counts: WordCounts, rules: Counter[str], *, min_count: int, min_target_count: int
) -> Groups:
    """Drops pairs whose words occur less often in the corpora of their languages; they are counted in `rules`.

    Raises:
        UserError: a language with a limit has no corpus.
    """
    text_count = _text_counts(groups, counts)
    keep = np.ones(len(groups.pair_target), dtype=bool)
    for rule, option, limit, texts in (
        (RARE_SOURCE, "--min-count", min_count, groups.source[groups.pair_group]),
        (RARE_TARGET, "--min-target-count", min_target_count, groups.pair_target),
    ):
        rules[rule] += 0
        if limit:
            _check_counted(groups, texts, counts, f"{option} {limit}")
            bad = text_count[texts] < limit
            rules[rule] += int((keep & bad).sum())
            keep &= ~bad
    return groups if keep.all() else keep_pairs(groups, keep)


def order_pairs(groups: Groups, order: str, counts: WordCounts) -> Groups:
    """Sorts the translations of each group and language.

    Args:
        order: `weight` sorts by descending weight, `frequency` by descending occurrences in the corpora of the
            language; ties keep the order of the files.

    Raises:
        UserError: `frequency` is requested and a target language has no corpus.
    """
    if order == "weight":
        rank = -groups.pair_weight.astype(np.float64)
    else:
        _check_counted(groups, groups.pair_target, counts, "--order frequency")
        rank = -_text_counts(groups, counts)[groups.pair_target].astype(np.float64)
    permutation = np.lexsort((rank, groups.text_language[groups.pair_target], groups.pair_group))
    return replace(
        groups,
        pair_group=groups.pair_group[permutation],
        pair_target=groups.pair_target[permutation],
        pair_weight=groups.pair_weight[permutation],
    )


def _text_counts(groups: Groups, counts: WordCounts) -> NDArray[np.int64]:
    """Occurrences of every text in the corpora of its language `[T]`."""
    result = np.zeros(len(groups.texts), dtype=np.int64)
    for number, language in enumerate(groups.languages):
        if language in counts:
            texts = np.flatnonzero(groups.text_language == number)
            result[texts] = occurrences([groups.texts[text] for text in texts.tolist()], counts[language])
    return result


def _check_counted(groups: Groups, texts: NDArray[np.int32], counts: WordCounts, option: str) -> None:
    languages = [groups.languages[number] for number in np.unique(groups.text_language[texts])]
    missing = [language for language in languages if language not in counts]
    if missing:
        raise UserError(
            f"{option} needs a corpus in every language whose words it counts, missing: {', '.join(missing)}; add "
            "preprocessed datasets with --corpus"
        )
