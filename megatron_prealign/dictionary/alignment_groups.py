"""Which words of a table the alignment phase can use. Imports no torch, so that a recipe is checked without it."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import offsets_of, row_numbers
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import AlignmentSection


class AlignmentGroups(NamedTuple):
    """The usable words, group by group and in it language by language: a *place* is the words of one language of a
    group. P places, G groups that may be drawn."""

    words: NDArray[np.int64]
    """Words of the table; those of a place lie together."""
    first: NDArray[np.int64]
    """Where in `words` each place begins `[P]`."""
    counts: NDArray[np.int64]
    """Words of each place `[P]`."""
    language: NDArray[np.int64]
    """Language of each place `[P]`."""
    place_offsets: NDArray[np.int64]
    """Places of each group `[G+1]`, at least two each."""
    frequency: NDArray[np.int64]
    """Occurrences of each group's source word in the counting corpus `[G]`."""
    too_long: NDArray[np.int64]
    """Words left out because they have too many tokens."""


def alignment_groups(table: DictionaryTable, section: AlignmentSection, *, held_out: np.ndarray) -> AlignmentGroups:
    """Selects the words and groups that the alignment phase draws from.

    Args:
        held_out: bool `[groups]`, groups never drawn.

    Raises:
        UserError: a language has a weight but no words, no group is left, or fewer words than a step draws.
    """
    languages = len(table.languages)
    wanted = _wanted_languages(table, section)
    length = np.diff(table.word_offsets)
    count = len(table.group_offsets) - 1
    group_of_word = row_numbers(table.group_offsets)
    candidate = (length > 0) & wanted[table.word_language] & ~held_out[group_of_word]
    fits = length <= section.max_word_tokens
    usable = np.flatnonzero(candidate & fits)
    place = group_of_word[usable] * languages + table.word_language[usable]
    order = np.argsort(place, kind="stable")
    places, first, counts = np.unique(place[order], return_index=True, return_counts=True)
    places_of_group = np.bincount(places // languages, minlength=count)
    groups = np.flatnonzero(places_of_group >= 2)
    kept = places_of_group[places // languages] >= 2
    sizes = places_of_group[groups]
    found = AlignmentGroups(
        words=usable[order],
        first=first[kept],
        counts=counts[kept],
        language=places[kept] % languages,
        place_offsets=offsets_of(sizes),
        frequency=table.group_count[groups],
        too_long=np.flatnonzero(candidate & ~fits),
    )
    _check_enough(found, table, section)
    if section.frequency_exponent > 0 and not found.frequency.any():
        raise UserError(
            f"alignment.frequency_exponent is {section.frequency_exponent}, but the dictionary was built without a "
            "counting corpus; set it to 0 or build the dictionary with --corpus"
        )
    return found


def _wanted_languages(table: DictionaryTable, section: AlignmentSection) -> NDArray[np.bool_]:
    """Bool `[languages]`, which of the table's languages are drawn."""
    weights = section.language_weights
    unknown = sorted(weights.keys() - set(table.languages))
    if unknown:
        raise UserError(
            f"alignment.language_weights names {', '.join(unknown)}, but the dictionary is of "
            f"{', '.join(table.languages)}; correct the codes or build the dictionary with these languages"
        )
    limit, there = section.languages_per_group, len(weights) or len(table.languages)
    if limit is not None and limit > there:
        raise UserError(
            f"alignment.languages_per_group is {limit}, but only {there} languages are drawn from "
            f"({', '.join(sorted(weights) or table.languages)}); lower it, or leave it out to take all"
        )
    return np.array([not weights or language in weights for language in table.languages])


def _check_enough(found: AlignmentGroups, table: DictionaryTable, section: AlignmentSection) -> None:
    """Two words of different languages make a group that can be drawn."""
    sizes = np.diff(found.place_offsets)
    words = int(np.minimum(sizes, section.languages_per_group or len(table.languages)).sum())
    if words >= section.words_per_step:
        return
    of_groups = f"of {len(table.group_offsets) - 1:,} groups in the dictionary"
    why = (
        f"with words in two languages of at most alignment.max_word_tokens ({section.max_word_tokens}) tokens outside "
        "the held-out share"
    )
    if not words:
        raise UserError(
            f"no group is left to align: {of_groups}, none has been found {why}; raise alignment.max_word_tokens, or "
            "check the languages of the dictionary and of alignment.language_weights"
        )
    raise UserError(
        f"alignment.words_per_step is {section.words_per_step}, but one draw can take {words} words: {of_groups}, "
        f"{len(sizes):,} are left {why}; lower it or build a larger table"
    )
