"""Which words of a table the alignment phase can use. Imports no torch, so that a recipe is checked without it."""

from typing import NamedTuple

import numpy as np

from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError


class AlignmentGroups(NamedTuple):
    """The usable words by place; a place is a (group, language) pair, numbered `group * languages + language`."""

    words: np.ndarray
    """int64, words of the table; those of a place lie together."""
    places: np.ndarray
    """int64, the places that have words, ascending."""
    first: np.ndarray
    """int64, where in `words` each place begins."""
    counts: np.ndarray
    """int64, words of each place."""
    groups: np.ndarray
    """int64, the groups that may be drawn."""


def alignment_groups(
    table: DictionaryTable, *, held_out: np.ndarray, groups_per_step: int, max_word_tokens: int
) -> AlignmentGroups:
    """Selects the words and groups that the alignment phase draws from.

    Args:
        held_out: bool `[groups]`, groups never drawn.
        groups_per_step: groups that one step draws.
        max_word_tokens: longer words are left out; a group needs words of two languages that stay.

    Raises:
        UserError: fewer groups are left than one step draws.
    """
    languages = len(table.languages)
    length = np.diff(table.word_offsets)
    count = len(table.group_offsets) - 1
    group_of_word = np.repeat(np.arange(count), np.diff(table.group_offsets))
    usable = np.flatnonzero((length > 0) & (length <= max_word_tokens))
    place = group_of_word[usable] * languages + table.word_language[usable]
    order = np.argsort(place, kind="stable")
    places, first, counts = np.unique(place[order], return_index=True, return_counts=True)
    languages_left = np.bincount(places // languages, minlength=count)
    groups = np.flatnonzero((languages_left >= 2) & ~held_out)
    if len(groups) < groups_per_step:
        raise UserError(
            f"alignment.groups_per_step is {groups_per_step}, but the dictionary has {len(groups)} groups "
            f"with words in two languages of at most alignment.max_word_tokens ({max_word_tokens}) tokens outside "
            f"the held-out share (of {count}); lower it or build a larger table"
        )
    return AlignmentGroups(usable[order], places, first, counts, groups)
