"""What of a table a recipe's `code_switch` section asks for, and whether the table has it. Imports no torch."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import count_in_rows, offsets_of, row_indices, row_numbers
from megatron_prealign.dictionary.table import FORM_CASE, FORM_WORD_INITIAL, DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CodeSwitchSection


def switchable_table(table: DictionaryTable, section: CodeSwitchSection, languages: Sequence[str]) -> DictionaryTable:
    """`select_keys`, after `check_table`: what code-switching works with.

    Args:
        languages: the data's languages.

    Raises:
        UserError: the section or the data does not fit the table.
    """
    check_table(table, section, languages)
    return select_keys(table, section)


def check_table(table: DictionaryTable, section: CodeSwitchSection, languages: Sequence[str]) -> None:
    """Checks the languages of the section and of the data against those of the table; `select_keys` checks the rest.

    Args:
        languages: the data's languages.

    Raises:
        UserError: the section names a language that the table lacks, or the table has no words of the data's.
    """
    if not table.num_keys:
        raise _nothing_left(table, section)
    for name in ("language_weights", "language_ratios"):
        unknown = [each for each in getattr(section, name) if each not in table.languages]
        if unknown:
            raise UserError(
                f"code_switch.{name} names {', '.join(unknown)}, expected languages of {_name(table)}: "
                f"{', '.join(table.languages)}; correct the recipe or build the table with these languages"
            )
    _check_source_languages(table, section.source_languages)
    sources = section.source_languages or _key_languages(table)
    if not set(sources) & set(languages):
        chosen = " (code_switch.source_languages)" if section.source_languages else ""
        raise UserError(
            f"code_switch: {_name(table)} replaces words of {', '.join(sources)}{chosen}, the data is in "
            f"{', '.join(languages)}: nothing would ever be switched; add a source of that language or build the table "
            "the other way round"
        )


def select_keys(table: DictionaryTable, section: CodeSwitchSection) -> DictionaryTable:
    """The table with the keys and candidates that `section` asks for; words and groups stay.

    `source_languages`, `min_word_length` and `max_word_length` (characters of the group's source word) and `case`
    choose keys. With `case: keep` a key that is not written as in the dictionary gets the candidates of the one that
    is: the key of the same group and language, after a space or bare like itself, the first one should there be
    several. A key without such a partner goes, as do candidates that are now the same tokens as their key, which they
    would replace by itself. Candidates of a language that `language_weights` leaves out go too, and keys that have none
    left. `candidate_weights: uniform` makes every weight 1.

    Raises:
        UserError: `source_languages` names a language that the table has no keys for, or no key is left.
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
        raise _nothing_left(table, section)
    if section.candidate_weights == "uniform":
        chosen = replace(chosen, candidate_weight=np.ones_like(chosen.candidate_weight))
    return chosen


def _name(table: DictionaryTable) -> str:
    return f"the dictionary table{f' {table.path}' if table.path else ''}"


def _key_languages(table: DictionaryTable) -> list[str]:
    return [table.languages[index] for index in np.unique(table.key_language)]


def _choose(table: DictionaryTable, section: CodeSwitchSection) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The keys that `section` leaves, and for each of them the key whose candidates it gets."""
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
        raise _nothing_left(table, section)
    return keys, partner[keys]


def _nothing_left(table: DictionaryTable, section: CodeSwitchSection) -> UserError:
    fields = ("source_languages", "min_word_length", "max_word_length", "case")
    settings = ", ".join(f"{name} {getattr(section, name) or 'any'}" for name in fields)
    settings += f", language_weights of {', '.join(section.language_weights) or 'any'}"
    return UserError(
        f"code_switch: none of the {table.num_keys} keys of {_name(table)} is left ({settings}), expected one or more; "
        "loosen these fields or build a larger table"
    )


def _of_languages(table: DictionaryTable, languages: Sequence[str]) -> NDArray[np.bool_]:
    """The keys of these source languages, bool `[K]`; all keys for none."""
    if not languages:
        return np.ones(table.num_keys, dtype=bool)
    _check_source_languages(table, languages)
    return np.isin(table.key_language, [table.languages.index(each) for each in languages])


def _check_source_languages(table: DictionaryTable, languages: Sequence[str]) -> None:
    found = _key_languages(table)
    unknown = [each for each in languages if each not in found]
    if unknown:
        raise UserError(
            f"code_switch.source_languages names {', '.join(unknown)}, expected languages whose words {_name(table)} "
            f"can replace: {', '.join(found) or 'none'}; correct the recipe or build the table with words of these"
        )


def _source_length(table: DictionaryTable) -> NDArray[np.int64]:
    """Characters of each group's source word `[G]`."""
    # Every character of UTF-8 has one byte that is not 0b10......
    characters = offsets_of(table.word_text & 0xC0 != 0x80)
    first = table.group_offsets[:-1]
    return characters[table.word_text_offsets[first + 1]] - characters[table.word_text_offsets[first]]


def _partners(table: DictionaryTable) -> NDArray[np.int64]:
    """For each key the one of its group, language and place in the word that the dictionary spells out, or -1 `[K]`."""
    identity = (table.key_group.astype(np.int64) * len(table.languages) + table.key_language) * 2
    identity += table.key_form & FORM_WORD_INITIAL != 0
    as_is = table.key_form & FORM_CASE == 0
    spelled = np.flatnonzero(as_is)
    known, first = np.unique(identity[spelled], return_index=True)
    partner = np.full(table.num_keys, -1, dtype=np.int64)
    if len(known):
        place = np.minimum(np.searchsorted(known, identity), len(known) - 1)
        partner = np.where(known[place] == identity, spelled[first[place]], -1)
    partner[spelled] = spelled
    return partner


def _unchanged(table: DictionaryTable, changed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The candidates of the `changed` keys (bool `[K]`) that are their key's own tokens, bool `[C]`."""
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
    """The table with the candidates `keep` (bool `[C]`) and the keys that still have one."""
    candidate_key = row_numbers(table.key_candidate_offsets)
    left = np.bincount(candidate_key[keep], minlength=table.num_keys)
    tokens, candidate_offsets = row_indices(table.candidate_offsets, np.flatnonzero(keep))
    thinned = replace(
        table,
        key_candidate_offsets=offsets_of(left),
        candidate_tokens=table.candidate_tokens[tokens],
        candidate_offsets=candidate_offsets,
        candidate_language=table.candidate_language[keep],
        candidate_weight=table.candidate_weight[keep],
    )
    return thinned.with_keys(np.flatnonzero(left))
