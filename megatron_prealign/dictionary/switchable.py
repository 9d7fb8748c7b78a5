"""Selects the keys and candidates of a table for a recipe's `code_switch` section, and checks them. Torch-free."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import count_in_rows, offsets_of, row_indices, row_numbers
from megatron_prealign.dictionary.table import FORM_CASE, FORM_WORD_INITIAL, DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CodeSwitchSection


def switchable_table(table: DictionaryTable, section: CodeSwitchSection, languages: Sequence[str]) -> DictionaryTable:
    """Checks the table and returns the selection used by code-switching: `check_table`, then `select_keys`.

    Args:
        languages: languages of the data.

    Raises:
        UserError: the section or the data does not match the table.
    """
    check_table(table, section, languages)
    return select_keys(table, section)


def check_table(table: DictionaryTable, section: CodeSwitchSection, languages: Sequence[str]) -> None:
    """Checks the languages of the section and of the data against the table; `select_keys` checks the rest.

    Args:
        languages: languages of the data.

    Raises:
        UserError: the section has a language that is not in the table, or the table has no words of the data's
            languages.
    """
    if not table.num_keys:
        raise _no_keys_error(table, section)
    for name in ("language_weights", "language_ratios"):
        unknown = [each for each in getattr(section, name) if each not in table.languages]
        if unknown:
            raise UserError(
                f"code_switch.{name} has {', '.join(unknown)}, expected languages of {_name(table)}: "
                f"{', '.join(table.languages)}; fix the recipe or build the table with these languages"
            )
    _check_source_languages(table, section.source_languages)
    sources = section.source_languages or _key_languages(table)
    if not set(sources) & set(languages):
        chosen = " (code_switch.source_languages)" if section.source_languages else ""
        raise UserError(
            f"code_switch: no word would be switched: {_name(table)} replaces words of {', '.join(sources)}{chosen}, "
            f"but the data is in {', '.join(languages)}; add data in one of these languages or build the table with "
            "source and target swapped"
        )


def select_keys(table: DictionaryTable, section: CodeSwitchSection) -> DictionaryTable:
    """Selects the keys and candidates requested by `section`; words and groups are unchanged.

    Keys are filtered by `source_languages`, `min_word_length` and `max_word_length` (characters of the group's source
    word), and `case`. With `case: keep`, a key in another case than the dictionary's gets the candidates of its
    partner: the first key of the same group and language that is written as in the dictionary, with or without a
    leading space like itself. Keys without a partner are dropped, and so are candidates that are now identical to
    their key. Candidates of languages missing in `language_weights` are dropped, then keys without candidates.
    `candidate_weights: uniform` sets every weight to 1.

    Raises:
        UserError: `source_languages` has a language without keys in the table, or no key remains.
    """
    keys, partner = _choose(table, section)
    chosen = table.with_keys(keys, partner)
    keep = np.ones(chosen.num_candidates, dtype=bool)
    if section.language_weights:
        drawn = [index for index, language in enumerate(table.languages) if language in section.language_weights]
        keep &= np.isin(chosen.candidate_language, drawn)
    if (keys != partner).any():
        keep &= ~_unchanged(chosen, keys != partner)
    if not keep.all():
        chosen = _with_candidates(chosen, keep)
    if not chosen.num_keys:
        raise _no_keys_error(table, section)
    if section.candidate_weights == "uniform":
        chosen = replace(chosen, candidate_weight=np.ones_like(chosen.candidate_weight))
    return chosen


def _name(table: DictionaryTable) -> str:
    return f"the dictionary table{f' {table.path}' if table.path else ''}"


def _key_languages(table: DictionaryTable) -> list[str]:
    return [table.languages[index] for index in np.unique(table.key_language)]


def _choose(table: DictionaryTable, section: CodeSwitchSection) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the keys selected by `section`, and for each the key whose candidates it gets."""
    keep = _of_languages(table, section.source_languages)
    if section.min_word_length > 1 or section.max_word_length is not None:
        length = _source_length(table)[table.key_group]
        keep &= length >= section.min_word_length
        if section.max_word_length is not None:
            keep &= length <= section.max_word_length
    if section.case == "exact":
        keep &= table.key_form & FORM_CASE == 0
    partner = np.arange(table.num_keys)
    if section.case == "keep":
        partner = _partners(table)
        keep &= partner >= 0
    keys = np.flatnonzero(keep)
    if not len(keys):
        raise _no_keys_error(table, section)
    return keys, partner[keys]


def _no_keys_error(table: DictionaryTable, section: CodeSwitchSection) -> UserError:
    fields = ("source_languages", "min_word_length", "max_word_length", "case")
    settings = ", ".join(f"{name} {getattr(section, name) or 'any'}" for name in fields)
    settings += f", language_weights of {', '.join(section.language_weights) or 'any'}"
    return UserError(
        f"code_switch: none of the {table.num_keys} keys of {_name(table)} matches ({settings}), expected one or more; "
        "relax these fields or build a larger table"
    )


def _of_languages(table: DictionaryTable, languages: Sequence[str]) -> NDArray[np.bool_]:
    """Mask of the keys of these source languages, bool `[K]`; all keys if there are none."""
    if not languages:
        return np.ones(table.num_keys, dtype=bool)
    _check_source_languages(table, languages)
    return np.isin(table.key_language, [table.languages.index(each) for each in languages])


def _check_source_languages(table: DictionaryTable, languages: Sequence[str]) -> None:
    available = _key_languages(table)
    unknown = [each for each in languages if each not in available]
    if unknown:
        raise UserError(
            f"code_switch.source_languages has {', '.join(unknown)}, expected source languages of {_name(table)}: "
            f"{', '.join(available) or 'none'}; fix the recipe or build the table with words of these languages"
        )


def _source_length(table: DictionaryTable) -> NDArray[np.int64]:
    """Number of characters of each group's source word `[G]`."""
    # Every UTF-8 character has exactly one byte that is not 0b10......
    characters = offsets_of(table.word_text & 0xC0 != 0x80)
    first = table.group_offsets[:-1]
    return characters[table.word_text_offsets[first + 1]] - characters[table.word_text_offsets[first]]


def _partners(table: DictionaryTable) -> NDArray[np.int64]:
    """For each key, the key of its group, language and leading space that is spelled as in the dictionary, or -1
    `[K]`."""
    identity = (table.key_group.astype(np.int64) * len(table.languages) + table.key_language) * 2
    identity += table.key_form & FORM_WORD_INITIAL != 0
    as_is = table.key_form & FORM_CASE == 0
    spelled = np.flatnonzero(as_is)
    known, first = np.unique(identity[spelled], return_index=True)
    partner = np.full(table.num_keys, -1, dtype=np.int64)
    if len(known):
        match = np.minimum(np.searchsorted(known, identity), len(known) - 1)
        partner = np.where(known[match] == identity, spelled[first[match]], -1)
    partner[spelled] = spelled
    return partner


def _unchanged(table: DictionaryTable, changed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mask of candidates of the `changed` keys (bool `[K]`) that are identical to their key, bool `[C]`."""
    candidate_key = row_numbers(table.key_candidate_offsets)
    candidates = np.flatnonzero(changed[candidate_key])
    keys = candidate_key[candidates]
    same_length = np.diff(table.candidate_offsets)[candidates] == np.diff(table.key_offsets)[keys]
    candidates, keys = candidates[same_length], keys[same_length]
    index, offsets = row_indices(table.candidate_offsets, candidates)
    key_index, _ = row_indices(table.key_offsets, keys)
    different = count_in_rows(table.candidate_tokens[index] != table.key_tokens[key_index], offsets)
    unchanged = np.zeros(table.num_candidates, dtype=bool)
    unchanged[candidates[different == 0]] = True
    return unchanged


def _with_candidates(table: DictionaryTable, keep: NDArray[np.bool_]) -> DictionaryTable:
    """Returns the table with only the candidates `keep` (bool `[C]`) and the keys that still have one."""
    candidate_key = row_numbers(table.key_candidate_offsets)
    counts = np.bincount(candidate_key[keep], minlength=table.num_keys)
    filtered = table.with_candidates(np.flatnonzero(keep), offsets_of(counts))
    return filtered.with_keys(np.flatnonzero(counts))
