"""Grouping of pairs, and counts of the rules."""

from collections import Counter

import numpy as np
from support.dictionary_files import add_entries

from megatron_prealign.dictionary import groups as rules
from megatron_prealign.dictionary.groups import GroupBuilder, without_unused_texts
from megatron_prealign.dictionary.selection import keep_pairs
from megatron_prealign.dictionary.words import clean


def groups_of(builder: GroupBuilder) -> dict[str, list[str]]:
    built = builder.build()
    result: dict[str, list[str]] = {built.texts[source]: [] for source in built.source}
    for group, target in zip(built.pair_group, built.pair_target, strict=True):
        language = built.languages[built.text_language[target]]
        result[built.texts[built.source[group]]].append(f"{language}:{built.texts[target]}")
    return result


def test_files_are_merged_by_source_language_and_word():
    builder = GroupBuilder()
    assert add_entries(builder, [["bank", "Bank"], ["apple", "Apfel"], ["bank", "Ufer"]], ("en", "de")) == 3
    assert add_entries(builder, [["bank", "banque", "银行"]], ("en", "fr", "zh")) == 2
    add_entries(builder, [["bank", "bench"]], ("de", "en"))
    assert builder.build().languages == ("en", "de", "fr", "zh")
    # German and English "bank" are separate groups; translations are sorted by language, then in file order.
    built = builder.build()
    assert [built.texts[i] for i in built.source] == ["bank", "apple", "bank"]
    assert [built.texts[i] for i in built.pair_target] == ["Bank", "Ufer", "banque", "银行", "Apfel", "bench"]
    assert built.pair_group.tolist() == [0, 0, 0, 0, 1, 2]


def test_unused_texts_are_dropped():
    builder = GroupBuilder()
    add_entries(builder, [["apple", "Apfel"], ["bank", "Ufer"], ["bank", "Bank"], ["sea", "See"]], ("en", "de"))
    built = keep_pairs(builder.build(), np.array([False, False, True, True]))
    assert built.texts == ("apple", "bank", "sea", "Apfel", "Ufer", "Bank", "See")
    kept, used = without_unused_texts(built)
    assert kept.texts == ("bank", "sea", "Bank", "See")
    assert used.tolist() == [False, True, True, False, False, True, True]
    assert kept.text_language.tolist() == [0, 0, 1, 1]
    assert [kept.texts[text] for text in kept.source] == ["bank", "sea"]
    assert [kept.texts[text] for text in kept.pair_target] == ["Bank", "See"]
    assert kept.pair_group.tolist() == [0, 1]
    assert kept.source.dtype == built.source.dtype and kept.pair_target.dtype == built.pair_target.dtype


def test_case_distinguishes_groups():
    builder = GroupBuilder()
    add_entries(builder, [["polish", "polieren"], ["Polish", "polnisch"]], ("en", "de"))
    assert groups_of(builder) == {"polish": ["de:polieren"], "Polish": ["de:polnisch"]}


def test_every_rule_is_counted():
    builder = GroupBuilder()
    entries = [
        ["apple", "Apfel"],
        [" apple ", "Apfel"],
        ["apple", ""],
        ["apple tree", "Apfelbaum"],
        ["apple", "der\u00a0 Apfel"],
        ["&", "und"],
        ["dash", "---"],
        ["cafe\u0301", "Ka\u00adffee"],
    ]
    add_entries(builder, entries, ("en", "de"))
    assert groups_of(builder) == {"apple": ["de:Apfel", "de:der Apfel"], "café": ["de:Kaffee"]}
    assert {rule: count for rule, count in builder.counts.items() if count} == {
        rules.READ: 8,
        rules.DUPLICATE: 1,
        rules.EMPTY: 1,
        rules.MULTI_WORD_SOURCE: 1,
        rules.WITHOUT_LETTER: 2,
        # "der\u00a0 Apfel", "cafe\u0301" and "Ka\u00adffee"
        rules.CLEANED: 3,
    }


def test_the_largest_weight_of_a_pair_wins():
    builder = GroupBuilder()
    add_entries(builder, [["bank", "Bank"], ["bank", "Ufer"], [" bank", "Bank"]], ("en", "de"), [1.0, 0.25, 2.0])
    add_entries(builder, [["bank", "Bank"], ["bank", "banque"]], ("en", "de"), [0.5, 0.125])
    add_entries(builder, [["bank", "banque"]], ("en", "fr"))
    built = builder.build()
    assert [built.texts[i] for i in built.pair_target] == ["Bank", "Ufer", "banque", "banque"]
    assert built.pair_weight.tolist() == [2.0, 0.25, 0.125, 1.0]


def test_words_in_many_blocks_equal_words_in_one_block():
    words = ["bank", "bank ", "ba\u00adnk", "Bank", "être", "e\u0302tre", "", " ", "a b", "x  y", "1", "ABC", "銀行"]
    pairs = [[left, right] for left in words for right in words]
    one_block, many_blocks = GroupBuilder(), GroupBuilder()
    add_entries(one_block, pairs, ("en", "de"))
    for pair in pairs:
        add_entries(many_blocks, [pair], ("en", "de"))
    assert groups_of(one_block) == groups_of(many_blocks)
    assert one_block.counts == many_blocks.counts
    # A plain loop over the pairs that applies the rules one by one.
    counts: Counter[str] = Counter({rules.READ: len(pairs), rules.CLEANED: 3})
    expected: dict[str, list[str]] = {}
    for source, target in ([clean(word) for word in pair] for pair in pairs):
        if not source or not target:
            counts[rules.EMPTY] += 1
        elif " " in source:
            counts[rules.MULTI_WORD_SOURCE] += 1
        elif not any(map(str.isalpha, source)) or not any(map(str.isalpha, target)):
            counts[rules.WITHOUT_LETTER] += 1
        elif "銀行" in (source, target):
            counts[rules.WRONG_SCRIPT] += 1
        elif f"de:{target}" in expected.setdefault(source, []):
            counts[rules.DUPLICATE] += 1
        else:
            expected[source].append(f"de:{target}")
    assert groups_of(one_block) == expected
    assert one_block.counts == counts


def test_cleaning_keeps_zero_width_joiners():
    assert clean("می\u200cخواهم") == "می\u200cخواهم"
    assert clean("\ufeff\u200ein \x00 a\u200b\n") == "in a"


def test_identical_strings_are_kept_until_tokenisation():
    builder = GroupBuilder()
    add_entries(builder, [["apple", "apple"]], ("en", "en_clone"))
    assert groups_of(builder) == {"apple": ["en_clone:apple"]}
