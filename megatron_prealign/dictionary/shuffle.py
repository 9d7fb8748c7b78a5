"""Shuffles the translations of a table: the control that shows how much of an effect true pairs have.

Every word gets the translations of another word of its language. Source words, their order and their counts stay, so a
run with the shuffled table draws and replaces the same words equally often; only the pairs are wrong. With the words in
order of (tokens of the first translation, number of translations, count), translations move by a few places, so the new
ones are about as long and as frequent as the true ones. Words that training holds out exchange among each other:
otherwise the control would train their translations, as those of other words (144 of 146 of a German table).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.ragged import offsets_of, row_indices, row_numbers
from megatron_prealign.dictionary.table import FORM_CASE, FORM_WORD_INITIAL, DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.text import plural

# Places that translations move in the order of similar words; more would give rare words translations of frequent ones.
_WINDOW = 32
# Places searched for a word whose translations differ.
_SEARCHED = 1_000
_NONE = -1


@dataclass(frozen=True)
class ShuffleReport:
    """How alike the shuffled translations and the true ones are. A word counts once for each target language."""

    moved: int
    """Words with the translations of another word."""
    kept: int
    """Words that keep their translations, since no similar word has different ones."""
    equal_tokens: float
    """Fraction of the moved words whose first translation has as many tokens as before."""
    similar_counts: float
    """Fraction of the moved words whose translations are those of a word at most twice or half as frequent."""


class _Exchange(NamedTuple):
    """Translations in one target language."""

    language: int
    groups: NDArray[np.int64]
    """Groups with translations in this language, ascending."""
    donors: NDArray[np.int64]
    """Group that each of them gets its translations from."""


def shuffle_table(
    table: DictionaryTable, seed: int, share: float = 1.0, *, held_out_fraction: float = 0.0
) -> tuple[DictionaryTable, ShuffleReport]:
    """Returns the control of a table, which knows that it is one (`DictionaryTable.shuffled`), or a noisy table.

    Each target language is shuffled on its own: its words are no translations of those of another one either. A word
    in a spelling that the other word does not have (capitalised, after a space) gets translations in the nearest one.

    Args:
        table: The true pairs.
        seed: From 0; equal seeds give equal tables.
        share: Fraction of the groups, above 0, whose translations are shuffled among each other. Below 1 the result is
            no control but a table with this much noise.
        held_out_fraction: `dictionary.held_out_fraction` of the runs. The words that it holds out get translations of
            each other.

    Raises:
        UserError: The table is itself shuffled, or no translation can move.
    """
    if table.shuffled:
        raise UserError(f"{table.path}: got a shuffled table, expected one with true pairs; shuffle its original")
    random = np.random.default_rng(seed)
    chosen = np.ones(table.num_groups, dtype=bool) if share >= 1 else random.random(table.num_groups) < share
    exchanges = _exchanges(table, random, chosen, table.held_out_groups(held_out_fraction))
    report = _report(table, exchanges, chosen)
    if not report.moved:
        raise UserError(
            f"{table.path}: got {plural(int(chosen.sum()), 'group')} to shuffle, expected two or more words of a "
            f"language with different translations; {'raise --share or ' if share < 1 else ''}add word lists"
        )
    shuffled = _with_candidates(_with_words(table, exchanges), exchanges)
    record = {
        "seed": seed,
        "original": table.switching_fingerprint(),
        "kept": report.kept,
        "held_out_fraction": held_out_fraction,
    }
    if share < 1:
        record["share"] = share
    return replace(shuffled, build={**table.build, "shuffled": record}, path=None), report


def _exchanges(
    table: DictionaryTable, random: np.random.Generator, chosen: NDArray[np.bool_], held_out: NDArray[np.bool_]
) -> list[_Exchange]:
    """
    Args:
        chosen: Mask `[groups]` of those that exchange translations.
        held_out: Mask `[groups]` of those that exchange among each other.
    """
    texts = _casefolded(table)
    group_of_word = row_numbers(table.group_offsets)
    source_words = table.group_offsets[:-1]
    source_language = table.word_language[source_words]
    taken: defaultdict[int, set[int]] = defaultdict(set)
    exchanges = []
    for language in range(len(table.languages)):
        words = _translations(table, language)
        if not len(words):
            continue
        groups, first, number = np.unique(group_of_word[words], return_index=True, return_counts=True)
        tokens = np.diff(table.word_offsets)[words[first]]
        order = np.lexsort((random.random(len(groups)), table.group_count[groups], number, tokens))
        # A key needs candidates, so words that are replaced in texts exchange with each other.
        replaced = np.isin(groups, table.key_group[_key_candidates(table, language).keys])
        translations: defaultdict[int, set[str]] = defaultdict(set)
        for word, group in zip(words.tolist(), group_of_word[words].tolist(), strict=True):
            translations[group].add(texts[word])

        def differs(group: int, donor: int, translations: dict[int, set[str]] = translations) -> bool:
            return (
                donor not in taken[group]
                and texts[source_words[group]] != texts[source_words[donor]]
                and translations[group].isdisjoint(translations[donor])
            )

        donors = groups.copy()
        kinds = np.stack([source_language[groups], replaced, held_out[groups]], axis=1)
        for kind in np.unique(kinds, axis=0):
            alike = (kinds[order] == kind).all(axis=1)
            members = order[alike & chosen[groups[order]]]
            donors[members] = _exchange(groups[members].tolist(), differs, random)
        for group, donor in zip(groups.tolist(), donors.tolist(), strict=True):
            taken[group].add(donor)
        exchanges.append(_Exchange(language, groups, donors))
    return exchanges


def _casefolded(table: DictionaryTable) -> list[str]:
    data, offsets = table.word_text.tobytes(), table.word_text_offsets.tolist()
    return [data[begin:end].decode().casefold() for begin, end in zip(offsets, offsets[1:], strict=False)]


def _translations(table: DictionaryTable, language: int) -> NDArray[np.int64]:
    """Words of the table that are translations in this language, in order."""
    found = table.word_language == language
    found[table.group_offsets[:-1]] = False
    return np.flatnonzero(found)


class _KeyCandidates(NamedTuple):
    """Candidates in one language."""

    keys: NDArray[np.int64]
    """Keys with such candidates, ascending."""
    first: NDArray[np.int64]
    """The first of them of each key; the others follow it."""
    number: NDArray[np.int64]


def _key_candidates(table: DictionaryTable, language: int) -> _KeyCandidates:
    candidates = np.flatnonzero(table.candidate_language == language)
    owners = row_numbers(table.key_candidate_offsets)[candidates]
    keys, first, number = np.unique(owners, return_index=True, return_counts=True)
    # The candidates of a key are sorted by language.
    return _KeyCandidates(keys, candidates[first], number)


def _exchange(groups: list[int], differs: Callable[[int, int], bool], random: np.random.Generator) -> list[int]:
    """Returns the donor of each group: itself if none within reach differs."""
    count = len(groups)
    places = np.argsort(np.arange(count) + _WINDOW * random.random(count), kind="stable")
    donors = [groups[place] for place in places.tolist()]
    for place, group in enumerate(groups):
        if differs(group, donors[place]):
            continue
        for other in _nearest(place, count):
            if differs(group, donors[other]) and differs(groups[other], donors[place]):
                donors[place], donors[other] = donors[other], donors[place]
                break
    _keep(groups, donors, differs)
    return donors


def _keep(groups: list[int], donors: list[int], differs: Callable[[int, int], bool]) -> None:
    """Gives groups without a donor that differs their own translations; who had these gets what that group had."""
    holders = {donor: place for place, donor in enumerate(donors)}
    for start in range(len(groups)):
        place = start
        # The one who had them may now have none that differ: it keeps its own, too.
        while donors[place] != groups[place] and not differs(groups[place], donors[place]):
            holder = holders[groups[place]]
            donors[holder], donors[place] = donors[place], groups[place]
            holders[donors[holder]] = holder
            place = holder


def _nearest(place: int, count: int) -> Iterator[int]:
    """Other places, the nearest first."""
    for distance in range(1, min(count, _SEARCHED)):
        yield from (other for other in (place - distance, place + distance) if 0 <= other < count)


def _with_words(table: DictionaryTable, exchanges: list[_Exchange]) -> DictionaryTable:
    """The table with the words of the donors as translations, by language."""
    group_of_word = row_numbers(table.group_offsets)
    words, owners, ranks = [table.group_offsets[:-1]], [np.arange(table.num_groups)], [np.full(table.num_groups, _NONE)]
    for language, groups, donors in exchanges:
        translations = _translations(table, language)
        offsets = offsets_of(np.bincount(group_of_word[translations], minlength=table.num_groups))
        index, received = row_indices(offsets, donors)
        words.append(translations[index])
        owners.append(np.repeat(groups, np.diff(received)))
        ranks.append(np.full(len(index), language))
    owner = np.concatenate(owners)
    order = np.lexsort((np.concatenate(ranks), owner))
    chosen = np.concatenate(words)[order]
    tokens, word_offsets = row_indices(table.word_offsets, chosen)
    characters, word_text_offsets = row_indices(table.word_text_offsets, chosen)
    return replace(
        table,
        word_tokens=table.word_tokens[tokens],
        word_offsets=word_offsets,
        word_language=table.word_language[chosen],
        word_text=table.word_text[characters],
        word_text_offsets=word_text_offsets,
        word_weight=None if table.word_weight is None else table.word_weight[chosen],
        group_offsets=offsets_of(np.bincount(owner, minlength=table.num_groups)),
    )


def _with_candidates(table: DictionaryTable, exchanges: list[_Exchange]) -> DictionaryTable:
    """The table with the candidates of the donors' keys in the same spelling, or in the nearest one."""
    keys, first, number = [], [], []
    by_language = {exchange.language: exchange for exchange in exchanges}
    for language in np.unique(table.candidate_language).tolist():
        own = _key_candidates(table, language)
        donor_of = np.arange(table.num_groups)
        if language in by_language:
            donor_of[by_language[language].groups] = by_language[language].donors
        given = _keys_in_spelling(table, own.keys, donor_of[table.key_group[own.keys]])
        keys.append(own.keys)
        first.append(own.first[given])
        number.append(own.number[given])
    key = np.concatenate(keys)
    # Languages come in order, which a stable sort keeps within a key.
    order = np.argsort(key, kind="stable")
    begins, lengths = np.concatenate(first)[order], np.concatenate(number)[order]
    ends = offsets_of(lengths)
    candidates = np.arange(ends[-1]) + np.repeat(begins - ends[:-1], lengths)
    totals = np.bincount(key[order], weights=lengths, minlength=table.num_keys).astype(np.int64)
    return table.with_candidates(candidates, offsets_of(totals))


def _keys_in_spelling(table: DictionaryTable, keys: NDArray[np.int64], donors: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each of `keys` the place in `keys` of a key of its donor: in the same spelling, else in the nearest one.

    Args:
        donors: A group of each key that has keys among `keys`.
    """
    place_of = np.full((table.num_groups, (FORM_CASE | FORM_WORD_INITIAL) + 1), _NONE)
    forms = table.key_form[keys].astype(np.int64)
    # The first key of a group in a spelling is assigned last and stays.
    places = np.arange(len(keys))[::-1]
    place_of[table.key_group[keys[places]], forms[places]] = places
    case, initial = forms & FORM_CASE, forms & FORM_WORD_INITIAL
    found = place_of[donors, forms]
    for other_initial in (initial, initial ^ FORM_WORD_INITIAL):
        for other_case in (case, 0, 1, 2):
            found = np.where(found == _NONE, place_of[donors, other_initial | other_case], found)
    return found


def _report(table: DictionaryTable, exchanges: list[_Exchange], chosen: NDArray[np.bool_]) -> ShuffleReport:
    tokens = np.diff(table.word_offsets)
    moved = kept = equal = similar = 0
    for language, groups, donors in exchanges:
        words = _translations(table, language)
        _, first = np.unique(row_numbers(table.group_offsets)[words], return_index=True)
        length = np.zeros(table.num_groups, dtype=np.int64)
        length[groups] = tokens[words[first]]
        moves = groups != donors
        group, donor = groups[moves], donors[moves]
        # A word that does not occur is similar to one that occurs once.
        ratio = (table.group_count[group] + 1) / (table.group_count[donor] + 1)
        moved, kept = moved + len(group), kept + int((~moves & chosen[groups]).sum())
        equal += int((length[group] == length[donor]).sum())
        similar += int(((ratio >= 0.5) & (ratio <= 2)).sum())
    return ShuffleReport(moved, kept, equal / max(moved, 1), similar / max(moved, 1))
