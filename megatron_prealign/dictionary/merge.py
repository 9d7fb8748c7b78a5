"""Merges the groups of several tables, to build one table from them.

Pairs are merged as if they had been read from lists, table by table. The result has the groups that one build of all
lists would give, unless a limit in a single build dropped a pair that the joint build would have kept. The order of the
groups may differ: a word whose first pairs were dropped is placed by its first remaining pair.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.groups import DUPLICATE, READ, Groups, group_pairs
from megatron_prealign.dictionary.table import DictionaryTable


def merge_groups(tables: Sequence[DictionaryTable], rules: Counter[str]) -> tuple[Groups, list[dict[str, Any]]]:
    """Returns the merged groups and the concatenated sources of all tables.

    Args:
        tables: one or more.
        rules: updated with the counts.
    """
    languages = tuple(dict.fromkeys(language for table in tables for language in table.languages))
    numbers: list[dict[str, int]] = [{} for _ in languages]
    parts = [_pairs(table, languages, numbers) for table in tables]
    sizes = [len(each) for each in numbers]
    first = np.cumsum([0, *sizes])
    source, target = (
        np.concatenate([first[part[f"{side}_language"]] + part[side] for part in parts])
        for side in ("source", "target")
    )
    groups, repeated = group_pairs(
        languages,
        [word for words in numbers for word in words],
        np.repeat(np.arange(len(languages), dtype=np.int16), sizes),
        source,
        target,
        np.concatenate([part["weight"] for part in parts]).astype(np.float32),
    )
    rules[READ] += len(source)
    rules[DUPLICATE] += repeated
    return groups, [source for table in tables for source in table.sources]


def _pairs(
    table: DictionaryTable, languages: tuple[str, ...], numbers: list[dict[str, int]]
) -> dict[str, NDArray[Any]]:
    """Returns the pairs of a table as word numbers per language; adds new words to `numbers`."""
    language = np.array([languages.index(each) for each in table.languages], dtype=np.int64)[table.word_language]
    data, offsets = table.word_text.tobytes(), table.word_text_offsets.tolist()
    number = np.empty(table.num_words, dtype=np.int64)
    for word, (language_id, begin, end) in enumerate(zip(language.tolist(), offsets, offsets[1:], strict=False)):
        known = numbers[language_id]
        number[word] = known.setdefault(data[begin:end].decode(), len(known))
    is_source = np.zeros(table.num_words, dtype=bool)
    is_source[table.group_offsets[:-1]] = True
    sizes = np.diff(table.group_offsets) - 1
    source = np.repeat(table.group_offsets[:-1], sizes)
    target = np.flatnonzero(~is_source)
    weight = np.ones(table.num_words, dtype=np.float32) if table.word_weight is None else table.word_weight
    return {
        "source": number[source],
        "source_language": language[source],
        "target": number[target],
        "target_language": language[target],
        "weight": weight[target],
    }


def merge_counts(merged: DictionaryTable, tables: Sequence[DictionaryTable]) -> DictionaryTable:
    """Returns `merged` with the source-word counts of the tables: the maximum of several, since corpora may be the
    same."""
    counts: dict[tuple[str, str], int] = {}
    for table in tables:
        for group in np.flatnonzero(table.group_count).tolist():
            source = table.group_words(group)[0]
            counts[source] = max(counts.get(source, 0), int(table.group_count[group]))
    if not counts:
        return merged
    group_count = [counts.get(merged.group_words(group)[0], 0) for group in range(merged.num_groups)]
    return replace(merged, group_count=np.array(group_count, dtype=np.int64))
