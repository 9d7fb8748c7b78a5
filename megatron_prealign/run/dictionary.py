"""The word table of a run, and what each part of the recipe takes of it. Imports no torch."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.alignment_groups import AlignmentGroups, alignment_groups
from megatron_prealign.dictionary.switchable import switchable_table
from megatron_prealign.dictionary.table import DictionaryTable, load_table
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.word_pairs import WordPairs, watched_pairs
from megatron_prealign.recipe import DictionarySection, Recipe


@dataclass(frozen=True, eq=False)
class SwitchingTable:
    """What code-switching replaces words with."""

    table: DictionaryTable
    """Without the held-out groups, with the keys and translations that the recipe asks for."""
    digest: str
    """Of the table without the held-out groups, for the checkpoints."""


@dataclass(frozen=True, eq=False)
class DictionaryParts:
    """The word table and its parts, opened once for the whole run."""

    table: DictionaryTable
    """All of it."""
    held_out: NDArray[np.bool_]
    """`[groups]`, the groups that training leaves out."""
    words: AlignmentGroups | None
    """What alignment steps draw from; None without the section `alignment`."""
    watched: list[WordPairs] | None
    """What the alignment watch measures; None without the section `alignment_watch`."""
    switching: SwitchingTable | None
    """None without the section `code_switch`."""


def load_words(section: DictionarySection, tokenizer_fingerprint: str) -> tuple[DictionaryTable, NDArray[np.bool_]]:
    """Loads the table and marks the groups `[groups]` that training leaves out.

    Raises:
        UserError: the table is missing, damaged or of another tokenizer.
    """
    table = load_table(section.table)
    table.check_tokenizer(tokenizer_fingerprint)
    return table, table.held_out_groups(section.held_out_fraction)


def open_dictionary(recipe: Recipe, tokenizer_fingerprint: str) -> DictionaryParts | None:
    """Opens the recipe's table with all parts that the recipe uses; None if it names none.

    Raises:
        UserError: the table is missing, damaged or of another tokenizer or other languages, or a section asks for what
            it does not have.
    """
    if recipe.dictionary is None:
        return None
    languages = recipe.data.languages
    table, held_out = load_words(recipe.dictionary, tokenizer_fingerprint)
    if not set(table.languages) & set(languages):
        raise UserError(
            f"the dictionary table {recipe.dictionary.table} is of {', '.join(table.languages)}, but the data is in "
            f"{', '.join(languages)}; build the table for the data's languages"
        )
    words = watched = switching = None
    if recipe.alignment is not None:
        words = alignment_groups(table, recipe.alignment, held_out=held_out)
    if recipe.alignment_watch is not None:
        watched = watched_pairs(table, held_out, recipe.alignment_watch, max_word_tokens=recipe.max_word_tokens)
    if recipe.code_switch is not None:
        trained = table.without_groups(held_out)
        selected = switchable_table(trained, recipe.code_switch, languages)
        switching = SwitchingTable(selected, trained.switching_digest())
    return DictionaryParts(table, held_out, words, watched, switching)
