"""Selects the words of a table for the alignment phase. Torch-free, so that recipes are validated without torch."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import offsets_of, row_numbers
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import AlignmentSection


class AlignmentGroups(NamedTuple):
    """Usable words, sorted by group and language. A *place* is the set of words of one language in a group. P places,
    G groups that can be drawn."""

    words: NDArray[np.int64]
    """Word indices of the table; the words of a place are contiguous."""
    first: NDArray[np.int64]
    """Start of each place in `words` `[P]`."""
    counts: NDArray[np.int64]
    """Number of words of each place `[P]`."""
    language: NDArray[np.int64]
    """Language id of each place `[P]`."""
    place_offsets: NDArray[np.int64]
    """Offsets of each group's places `[G+1]`, at least two places each."""
    frequency: NDArray[np.int64]
    """Occurrences of each group's source word in the counting corpus `[G]`."""
    too_long: NDArray[np.int64]
    """Word indices dropped for having too many tokens."""


def alignment_groups(table: DictionaryTable, section: AlignmentSection, *, held_out: np.ndarray) -> AlignmentGroups:
    """Selects the words and groups that the alignment phase draws from.

    Args:
        held_out: bool `[groups]`, groups that are never drawn.

    Raises:
        UserError: a language has a weight but no words, no group remains, or the groups have fewer words than a step
            draws.
    """
    languages = len(table.languages)
    selected = _selected_languages(table, section)
    length = np.diff(table.word_offsets)
    count = len(table.group_offsets) - 1
    group_of_word = row_numbers(table.group_offsets)
    candidate = (length > 0) & selected[table.word_language] & ~held_out[group_of_word]
    fits = length <= section.max_word_tokens
    usable = np.flatnonzero(candidate & fits)
    place = group_of_word[usable] * languages + table.word_language[usable]
    order = np.argsort(place, kind="stable")
    places, first, counts = np.unique(place[order], return_index=True, return_counts=True)
    places_of_group = np.bincount(places // languages, minlength=count)
    groups = np.flatnonzero(places_of_group >= 2)
    kept = places_of_group[places // languages] >= 2
    sizes = places_of_group[groups]
    result = AlignmentGroups(
        words=usable[order],
        first=first[kept],
        counts=counts[kept],
        language=places[kept] % languages,
        place_offsets=offsets_of(sizes),
        frequency=table.group_count[groups],
        too_long=np.flatnonzero(candidate & ~fits),
    )
    _check_num_words(result, table, section)
    if section.frequency_exponent > 0 and not result.frequency.any():
        raise UserError(
            f"alignment.frequency_exponent is {section.frequency_exponent}, but the dictionary was built without a "
            "counting corpus; set it to 0 or build the dictionary with --corpus"
        )
    return result


def _selected_languages(table: DictionaryTable, section: AlignmentSection) -> NDArray[np.bool_]:
    """Mask of the table's languages that are drawn, bool `[languages]`."""
    weights = section.language_weights
    unknown = sorted(weights.keys() - set(table.languages))
    if unknown:
        raise UserError(
            f"alignment.language_weights has {', '.join(unknown)}, expected languages of the dictionary: "
            f"{', '.join(table.languages)}; fix the codes or build the dictionary with these languages"
        )
    limit, available = section.languages_per_group, len(weights) or len(table.languages)
    if limit is not None and limit > available:
        raise UserError(
            f"alignment.languages_per_group is {limit}, expected at most {available}, the number of languages "
            f"({', '.join(sorted(weights) or table.languages)}); lower it, or remove it to use all languages"
        )
    return np.array([not weights or language in weights for language in table.languages])


def _check_num_words(groups: AlignmentGroups, table: DictionaryTable, section: AlignmentSection) -> None:
    """Checks that one pass over the groups has enough words for a step."""
    sizes = np.diff(groups.place_offsets)
    words = int(np.minimum(sizes, section.languages_per_group or len(table.languages)).sum())
    if words >= section.words_per_step:
        return
    usable = (
        f"{len(sizes):,} of {len(table.group_offsets) - 1:,} groups of the dictionary are usable (not held out, words "
        f"in two languages with at most alignment.max_word_tokens = {section.max_word_tokens} tokens)"
    )
    if not words:
        raise UserError(
            f"no groups to align: {usable}; raise alignment.max_word_tokens, or check the languages of the dictionary "
            "and of alignment.language_weights"
        )
    raise UserError(
        f"alignment.words_per_step is {section.words_per_step}, expected at most {words}, the number of words in one "
        f"draw: {usable}; lower it or build a larger table"
    )
