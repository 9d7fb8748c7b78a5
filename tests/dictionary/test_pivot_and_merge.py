"""Joining lists over a pivot, merging tables, ordering translations and dropping rare words."""

import copy
from collections import Counter
from dataclasses import replace

import numpy as np
from support.dictionary_files import add_entries
from support.messages import assert_facts, user_error

from megatron_prealign.dictionary import pivot as pivot_rules
from megatron_prealign.dictionary import selection
from megatron_prealign.dictionary.build import BuildSettings, build_table, read_groups
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.coverage import split_words
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.lexicon import letter_boundaries
from megatron_prealign.dictionary.merge import merge_counts, merge_groups
from megatron_prealign.dictionary.pivot import join_over
from megatron_prealign.dictionary.readers import parse_input
from megatron_prealign.dictionary.running_words import count_words, distinct_words, letter_runs, occurrences, word_texts
from megatron_prealign.dictionary.table import TENSORS, load_table


def groups_of(*lists):
    """Groups of `(languages, pairs[, weights])`; sources may be phrases."""
    builder = GroupBuilder(phrase_sources=frozenset({"en"}))
    for languages, pairs, *weights in lists:
        add_entries(builder, pairs, tuple(languages.split("-")), *weights)
    return builder.build()


def pairs_of(groups):
    return [
        (groups.texts[groups.source[group]], groups.texts[target], round(float(weight), 4))
        for group, target, weight in zip(groups.pair_group, groups.pair_target, groups.pair_weight, strict=True)
    ]


DE_EN = [
    ["Ufer", "bank"],
    ["Ufer", "shore"],
    ["Bank", "bank"],
    ["Bank", "bench"],
    ["Eis", "ice cream"],
    ["Hund", "dog"],
]
EN_RU = [["bank", "банк"], ["bank", "берег"], ["shore", "берег"], ["bench", "скамья"], ["ice cream", "мороженое"]]


def test_joined_over_a_language():
    rules: Counter[str] = Counter()
    joined = join_over(groups_of(("de-en", DE_EN), ("en-ru", EN_RU)), "en", rules)
    # Ufer → bank → банк and Bank → bank → банк or берег have only one ambiguous pivot word.
    assert pairs_of(joined) == [
        ("Ufer", "берег", 0.75),
        ("Bank", "скамья", 0.5),
        ("Eis", "мороженое", 1.0),
    ]
    assert {rule: count for rule, count in rules.items() if count} == {
        pivot_rules.BRIDGE: 11,
        pivot_rules.JOINED: 3,
        pivot_rules.AMBIGUOUS: 3,
    }
    everything = join_over(groups_of(("de-en", DE_EN), ("en-ru", EN_RU)), "en", Counter(), keep_ambiguous=True)
    assert pairs_of(everything) == [
        ("Ufer", "берег", 0.75),
        ("Ufer", "банк", 0.25),
        ("Bank", "скамья", 0.5),
        ("Bank", "банк", 0.25),
        ("Bank", "берег", 0.25),
        ("Eis", "мороженое", 1.0),
    ]


def test_two_pivot_words_support_a_pair():
    left = [["Ufer", "bank"], ["Ufer", "coast"]]
    right = [["bank", "берег"], ["bank", "банк"], ["coast", "берег"], ["coast", "побережье"]]
    assert pairs_of(join_over(groups_of(("de-en", left), ("en-ru", right)), "en", Counter())) == [
        ("Ufer", "берег", 0.5)
    ]


def test_a_word_is_not_joined_with_its_own_language():
    lists = ("de-en", [["Hund", "dog"]]), ("en-de", [["dog", "Hund"], ["dog", "Köter"]]), ("en-ru", [["dog", "собака"]])
    groups = groups_of(*lists)
    for keep_ambiguous in (False, True):
        joined = join_over(groups, "en", Counter(), keep_ambiguous=keep_ambiguous)
        assert pairs_of(joined) == [("Hund", "собака", 1.0)]


def test_weights_of_the_steps():
    left, right = [["Haus", "house"], ["Haus", "home"]], [["house", "дом"], ["home", "дом"], ["home", "очаг"]]
    groups = groups_of(("de-en", left, [3.0, 1.0]), ("en-ru", right, [1.0, 1.0, 3.0]))
    # 3/4 · 1 + 1/4 · 1/4; Haus → очаг has a single, ambiguous pivot word.
    assert pairs_of(join_over(groups, "en", Counter())) == [("Haus", "дом", 0.8125)]


def test_direct_pairs_come_first_and_the_bridge_is_dropped():
    lists = [("de-en", DE_EN), ("en-ru", EN_RU), ("de-ru", [["Bank", "банка"], ["Eis", "мороженое"]])]
    rules: Counter[str] = Counter()
    joined = pairs_of(join_over(groups_of(*lists), "en", rules))
    # 13 pairs, 11 of them bridge pairs; of the 3 joined pairs, Eis → мороженое is also a direct pair.
    assert (rules[pivot_rules.JOINED], rules[pivot_rules.KNOWN], len(joined)) == (3, 1, 13 - 11 + 3 - 1)
    assert joined[:2] == [("Bank", "банка", 1.0), ("Bank", "скамья", 0.5)]
    assert ("Eis", "мороженое", 1.0) in joined and not any("bank" in pair for pair in joined)
    kept = pairs_of(join_over(groups_of(*lists), "en", Counter(), keep_bridge=True))
    assert ("bank", "банк", 1.0) in kept and ("Bank", "bank", 1.0) in kept
    assert not any(source == "ice cream" for source, _, _ in kept)


def test_pivot_words_with_very_many_translations():
    left = [[f"wort{number}", "thing"] for number in "abcdefghij"]
    right = [["thing", "вещь" + "ы" * number] for number in range(1, 60)]
    rules: Counter[str] = Counter()
    joined = join_over(
        groups_of(("de-en", [*left, ["Hund", "dog"]]), ("en-ru", [*right, ["dog", "собака"]])), "en", rules
    )
    assert pairs_of(joined) == [("Hund", "собака", 1.0)]
    assert rules[pivot_rules.WIDE] == 10 * 59
    few, rules = groups_of(("de-en", left), ("en-ru", right[: pivot_rules.MOST_TRANSLATIONS])), Counter()
    assert len(join_over(few, "en", rules, keep_ambiguous=True).pair_target) == 10 * 50 and not rules[pivot_rules.WIDE]


def test_a_pivot_without_lists():
    with user_error("--pivot en", "en as its source", "en-xx"):
        join_over(groups_of(("de-en", DE_EN)), "en", Counter())
    with user_error("--pivot fr", "fr as its target", "xx-fr"):
        join_over(groups_of(("de-en", DE_EN)), "fr", Counter())


# Reversed lists


def test_a_mixed_list_is_not_swapped(tmp_path):
    path = tmp_path / "a.tsv"
    rows = ["apple\tяблоко", "house\tдом", *(f"слово{letter}\tword" for letter in "абв")]
    path.write_text("\n".join(rows), encoding="utf-8")
    report = BuildReport()
    read_groups([parse_input(f"{path}:en-ru")], report)
    (warning,) = report.warnings
    assert_facts(warning, path, "2 of 5 pairs", "en-ru")


def test_reversed_lists(tmp_path):
    (tmp_path / "a.tsv").write_text("яблоко\tapple\nдом\thouse\n", encoding="utf-8")
    (tmp_path / "b.tsv").write_text("house\tHaus\n")
    inputs = [parse_input(f"{tmp_path}/a.tsv:ru-en"), parse_input(f"{tmp_path}/b.tsv:en-de")]
    groups, sources = read_groups(inputs, BuildReport(), source_language="en")
    assert pairs_of(groups) == [("apple", "яблоко", 1.0), ("house", "дом", 1.0), ("house", "Haus", 1.0)]
    assert [source["languages"] for source in sources] == ["ru-en", "en-de"]
    report = BuildReport()
    with user_error(tmp_path / "a.tsv", "en-ru are swapped", "2 of 2 pairs", "ru-en", "--source en"):
        read_groups([parse_input(f"{tmp_path}/a.tsv:en-ru")], report)
    (tmp_path / "a.tsv").write_text("apple\tяблоко\nbank\tbanca\ncat\tgatta\n", encoding="utf-8")
    read_groups([parse_input(f"{tmp_path}/a.tsv:en-ru")], report)
    (warning,) = report.warnings
    assert_facts(warning, tmp_path / "a.tsv", "1 of 3 pairs", "en-ru")


# Order and frequency


def test_order_by_weight(tokenizer):
    groups = groups_of(("en-de", [["bank", "Ufer"], ["bank", "Haus"], ["bank", "rot"]], [1.0, 3.0, 3.0]))
    settings = BuildSettings(max_translations=2, order="weight")
    table = build_table(groups, tokenizer, settings, BuildReport())
    assert table.group_words(0) == [("en", "bank"), ("de", "Haus"), ("de", "rot")]
    assert table.word_weight is not None and table.word_weight.tolist() == [1.0, 3.0, 3.0]


COUNTS = {"en": {"bank": 5, "apple": 1}, "de": {"haus": 9, "das": 4, "rot": 1}}


def test_frequency(tokenizer):
    lists = ("en-de", [["bank", "rot"], ["bank", "das Haus"], ["bank", "Haus"], ["apple", "Haus"], ["house", "Haus"]])
    report = BuildReport()
    settings = BuildSettings(order="frequency", min_count=1, min_target_count=2)
    table = build_table(groups_of(lists), tokenizer, settings, report, counts=COUNTS)
    words = [table.group_words(group) for group in range(table.num_groups)]
    assert words == [[("en", "bank"), ("de", "Haus"), ("de", "das Haus")], [("en", "apple"), ("de", "Haus")]]
    assert (report.rules[selection.RARE_SOURCE], report.rules[selection.RARE_TARGET]) == (1, 1)
    assert table.build["settings"]["min_count"] == 1 and table.build["rules"][selection.RARE_TARGET] == 1
    for fields, option in (
        ({"min_target_count": 1}, "--min-target-count 1"),
        ({"order": "frequency"}, "--order frequency"),
    ):
        with user_error(option, "needs a corpus", "missing: de;", "--corpus"):
            build_table(groups_of(lists), tokenizer, BuildSettings(**fields), BuildReport(), counts={"en": {"bank": 1}})


def test_counted_words(tokenizer, make_dataset):
    prefix = make_dataset(tokenizer, ['The apple, (apple) and "Apple" - APPLE! 123 café.', "apple"], "en")
    counts = count_words([prefix, prefix], tokenizer, letter_boundaries(tokenizer), 1000)
    assert counts == {"en": {"the": 2, "apple": 10, "and": 2, "café": 2}}
    assert occurrences(["Apple", "the apple", "pear", "the-apple", "!"], counts["en"]).tolist() == [10, 2, 0, 2, 0]
    other = replace_fingerprint(tokenizer)
    with user_error(prefix, tokenizer.fingerprint, "sha256:other"):
        count_words([prefix], other, tokenizer.word_boundaries(), 1000)


def replace_fingerprint(tokenizer):
    other = copy.copy(tokenizer)
    other.fingerprint = "sha256:other"
    return other


def test_letters_of_words():
    assert letter_runs("Don't!") == ["don", "t"]
    assert letter_runs("Straße") == ["strasse"]
    assert letter_runs("हिन्दी, भाषा") == ["हिन्दी", "भाषा"]
    assert letter_runs("12") == []


def test_distinct_words(tokenizer):
    tokens = np.array(tokenizer.encode("The house, the red house. red"))
    words = split_words(tokens, np.zeros(1, dtype=np.int64), letter_boundaries(tokenizer))
    words = words.take(words.has_letter)
    distinct = distinct_words(tokens, words)
    assert word_texts(tokenizer, tokens, words, distinct.first)[:2] == ["house", "red"]
    assert distinct.occurrences.tolist() == [2, 2, 1, 1] and distinct.number.tolist() == [2, 0, 3, 1, 0, 1]


# Merging tables


def build(tokenizer, *lists, **settings):
    report = BuildReport()
    return build_table(groups_of(*lists), tokenizer, BuildSettings(**settings), report)


FIRST = ("en-de", [["apple", "Apfel"], ["bank", "Bank"], ["bank", "Ufer"], ["polish", "polieren"]])
SECOND = ("en-fr", [["house", "maison"], ["bank", "banque"]])
THIRD = ("en-de", [["Polish", "polnisch"], ["bank", "Haus"], ["bank", "Ufer"], ["red", "rot"]], [1.0, 2.0, 0.5, 1.0])


def test_merged_tables_equal_one_table_of_all_lists(tokenizer, tmp_path):
    expected = build(tokenizer, FIRST, SECOND, THIRD)
    parts = []
    for number, lists in enumerate(([FIRST, SECOND], [THIRD])):
        build(tokenizer, *lists).save(tmp_path / f"{number}")
        parts.append(load_table(tmp_path / f"{number}"))
    groups, _ = merge_groups(parts, Counter())
    merged = build_table(groups, tokenizer, BuildSettings(), BuildReport())
    assert merged.languages == expected.languages
    for name in TENSORS:
        assert np.array_equal(getattr(merged, name), getattr(expected, name)), name
    assert np.array_equal(merged.word_weight, expected.word_weight)


def test_merged_counts_are_the_largest(tokenizer):
    tables = [build(tokenizer, FIRST), build(tokenizer, SECOND)]
    groups, _ = merge_groups(tables, Counter())
    merged = build_table(groups, tokenizer, BuildSettings(), BuildReport())
    assert merge_counts(merged, tables) is merged
    counted = [replace(table, group_count=np.arange(1, table.num_groups + 1)) for table in tables]
    # apple, bank, polish; house, bank
    assert merge_counts(merged, counted).group_count.tolist() == [1, 2, 3, 1]
    # Both tables count bank 2 times; of different counts the larger one is kept, whichever table has it.
    counted[0] = replace(counted[0], group_count=np.array([1, 7, 3]))
    assert merge_counts(merged, counted).group_count.tolist() == [1, 7, 3, 1]
    counted[1] = replace(counted[1], group_count=np.array([1, 9]))
    assert merge_counts(merged, counted).group_count.tolist() == [1, 9, 3, 1]


def test_word_weights_are_checked(tokenizer, tmp_path):
    table = build(tokenizer, THIRD)
    assert table.word_weight is not None
    for weights in (table.word_weight[:-1], -table.word_weight, table.word_weight.astype(np.float64)):
        replace(table, word_weight=weights).save(tmp_path / "t")
        with user_error(tmp_path / "t", "table of format 2: word_weight "):
            load_table(tmp_path / "t")
