"""Dictionary table of a run and the parts of it that each recipe section uses. Imports no torch."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.alignment_groups import AlignmentGroups, alignment_groups
from megatron_prealign.dictionary.formats.language_codes import other_codes
from megatron_prealign.dictionary.switchable import switchable_table
from megatron_prealign.dictionary.table import DictionaryTable, load_table
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.word_pairs import WordPairs, watched_pairs
from megatron_prealign.recipe import DictionarySection, Recipe
from megatron_prealign.runtime.log import warn_on_rank_zero

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class SwitchingTable:
    """Table that code-switching looks words up in."""

    table: DictionaryTable
    """Table without the held-out groups, restricted to the keys and translations that the recipe selects."""
    fingerprint: str
    """Hash of the table without the held-out groups, saved in checkpoints."""


MeasuredTable = tuple[DictionaryTable, NDArray[np.bool_]]
"""Dictionary table and the mask `[groups]` of its held-out groups."""


@dataclass(frozen=True, eq=False)
class DictionaryParts:
    """Dictionary table and the parts derived from it, opened once per run."""

    table: DictionaryTable
    """Complete table."""
    held_out: NDArray[np.bool_]
    """Mask `[groups]` of the groups excluded from training."""
    measured: MeasuredTable
    """Table whose pairs evaluations measure."""
    words: AlignmentGroups | None
    """Groups that alignment steps draw from; None without the section `alignment`."""
    watched: list[WordPairs] | None
    """Word pairs that the alignment watch measures; None without the section `alignment_watch`."""
    switching: SwitchingTable | None
    """Table for code-switching; None without the section `code_switch`."""


def load_measured(section: DictionarySection, tokenizer_fingerprint: str) -> MeasuredTable:
    """Returns the table whose pairs evaluations measure.

    Raises:
        UserError: The table is missing, corrupt or built with another tokenizer.
    """
    return _load(section.measured_table, section, tokenizer_fingerprint)


def _load(path: str, section: DictionarySection, tokenizer_fingerprint: str) -> MeasuredTable:
    table = load_table(path)
    table.check_tokenizer(tokenizer_fingerprint)
    return table, table.held_out_groups(section.held_out_fraction)


def check_languages(languages: Sequence[str], table: DictionaryTable, name: str) -> None:
    """Checks that a dictionary table and the data have a language in common; logs a warning if a language has one code
    in the table and another in the data, because such words are not matched.

    Args:
        languages: Languages of the data.
        name: Field of the recipe and path of the table, for messages.

    Raises:
        UserError: They have none in common.
    """
    renamed = other_codes(table.languages, languages)
    pairs = ", ".join(f"{language} of the table is {code} in the data" for language, code in renamed.items())
    if not set(table.languages) & set(languages):
        raise UserError(
            f"{name} has languages {', '.join(table.languages)}, expected at least "
            f"one of the data's languages {', '.join(languages)}{'; ' if pairs else ''}{pairs}; build the table with "
            "the codes of the data"
        )
    if pairs:
        warn_on_rank_zero(
            logger,
            "%s: %s; their words are not matched, build the table with the codes of the data",
            name,
            pairs,
        )


def open_dictionary(recipe: Recipe, tokenizer_fingerprint: str) -> DictionaryParts | None:
    """Opens the recipe's dictionary table and the parts that the recipe uses; None if the recipe has no dictionary.

    Raises:
        UserError: The table is missing, corrupt or built with another tokenizer or for other languages, or a section
            requests something the table does not have.
    """
    if recipe.dictionary is None:
        return None
    section = recipe.dictionary
    table, held_out = _load(section.table, section, tokenizer_fingerprint)
    languages = recipe.data.languages
    check_languages(languages, table, f"dictionary.table {section.table}")
    measured = table, held_out
    if section.evaluation_table is not None:
        measured = load_measured(section, tokenizer_fingerprint)
        check_languages(languages, measured[0], f"dictionary.evaluation_table {section.evaluation_table}")
    words = watched = switching = None
    if recipe.alignment is not None:
        words = alignment_groups(table, recipe.alignment, held_out=held_out)
    if recipe.alignment_watch is not None:
        watched = watched_pairs(*measured, recipe.alignment_watch, max_word_tokens=recipe.max_word_tokens)
    if recipe.code_switch is not None:
        trained = table.without_groups(held_out)
        selected = switchable_table(trained, recipe.code_switch, languages)
        switching = SwitchingTable(selected, trained.switching_fingerprint())
    return DictionaryParts(table, held_out, measured, words, watched, switching)
