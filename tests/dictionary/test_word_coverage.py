"""Running words of each language that words of the table reach, counted by hand."""

import numpy as np
import pytest
from support.dictionary_files import add_entries

from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.dictionary.word_coverage import word_coverage
from megatron_prealign.recipe import DataSource


@pytest.fixture
def table(tokenizer) -> DictionaryTable:
    builder = GroupBuilder()
    add_entries(builder, [["apple", "Apfel"], ["house", "Haus"], ["New York", "Neu-York"]], ("en", "de"))
    return build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())


def test_both_languages_in_any_case(table, tokenizer, make_dataset):
    def source(language: str, *documents: str) -> DataSource:
        return DataSource(path=str(make_dataset(tokenizer, list(documents), language)), language=language)

    sources = [
        # Known: the first six; New York is of two words.
        source("en", "apple Apple APPLE, house (house) House", "New York 12"),
        # Known: apfel haus; the other two are English.
        source("de", "apfel Haus apple house 7"),
        source("fr", "apple"),
        source("it", "1 2"),
    ]
    everything = np.arange(table.num_words)
    assert word_coverage(table, everything, sources, tokenizer) == {"en": 6 / 8, "de": 2 / 4, "fr": 0.0}
    # Only the words that are drawn count.
    apple = np.array([word for word in everything if table.text(word) in ("apple", "Apfel")])
    assert word_coverage(table, apple, sources, tokenizer) == {"en": 3 / 8, "de": 1 / 4, "fr": 0.0}
