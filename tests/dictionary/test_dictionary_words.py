"""Cleaning and classifying words: notes, markup, scripts, lengths."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dictionary_files import add_entries
from support.messages import user_error

from megatron_prealign.dictionary import groups as rules
from megatron_prealign.dictionary.groups import Cleaning, GroupBuilder
from megatron_prealign.dictionary.scripts import scripts_of
from megatron_prealign.dictionary.words import FIRST_SCRIPT_BIT, TO_CLEAN, WordClassifier, clean


@pytest.mark.parametrize(
    ("word", "cleaned"),
    [
        ("Bank (Geld)", "Bank"),
        ("(sich) freuen", "freuen"),
        ("Lehrer(in)", "Lehrer"),
        ("a [b {c} (d)] e", "a e"),
        ("Haus <i>n</i> &amp; Hof", "Haus n & Hof"),
        ("Grundstock (an Wissen", "Grundstock"),
        ("[verschieden", "verschieden"),
        ("Bank)", "Bank"),
        ("银行（金融）", "银行"),
        ("''Haus'' l'eau", "Haus l'eau"),
        ("&lt;b&gt;x", "x"),
        ("&unknown; x", "&unknown; x"),
        ("(nur Notiz)", ""),
        ("M&uuml;he", "Mühe"),
        ("AT&T", "AT&T"),
    ],
)
def test_notes_and_markup(word, cleaned):
    assert clean(word) == cleaned
    assert clean(word, notes=False) == word


@settings(max_examples=300)
@given(st.text(st.sampled_from("ab ()[]{}<>&;'#x3amplt\u00e9\u0301\u200b\u00a0（）\U00020000\ud800"), max_size=30))
def test_clean_words_are_clean(word):
    cleaned = clean(word)
    assert clean(cleaned) == cleaned == cleaned.strip()
    # The classifier agrees: a word without TO_CLEAN is clean.
    flags = WordClassifier().classify(["x", word, "y"]).flags
    assert flags[1] & TO_CLEAN or cleaned == word


def test_properties_of_words():
    info = WordClassifier().classify(["apple", "", "яблоко и груша", "苹果 tree", "123"])
    assert info.characters.tolist() == [5, 0, 14, 7, 3]
    assert info.spaces.tolist() == [0, 0, 2, 1, 0]
    latin, cyrillic, han = scripts_of("en"), scripts_of("ru"), scripts_of("zh")
    scripts = [int(flags) >> FIRST_SCRIPT_BIT for flags in info.flags]
    assert scripts == [latin, 0, cyrillic, latin | han, 0]


def test_scripts_of_languages():
    assert scripts_of("en") == scripts_of("de_AT") == scripts_of("en_clone") == scripts_of("sr_Latn") != 0
    assert scripts_of("ja") & scripts_of("zh") == scripts_of("zh") != scripts_of("ja") == scripts_of("x_jpan")
    assert scripts_of("sr") == scripts_of("sr_latn") | scripts_of("ru")
    assert scripts_of("x") == 0


def build(pairs, languages=("en", "ru"), **fields):
    builder = GroupBuilder(cleaning=Cleaning(**fields))
    add_entries(builder, pairs, languages)
    built = builder.build()
    groups = [
        (built.texts[built.source[group]], built.texts[target])
        for group, target in zip(built.pair_group, built.pair_target, strict=True)
    ]
    return groups, {rule: count for rule, count in builder.counts.items() if count}


def test_every_filter_is_counted():
    pairs = [
        ["apple", "яблоко"],
        ["bank", "bank"],
        ["банк", "банк"],
        ["house", "дом (здание)"],
        ["house", "дом"],
        ["up", "в"],
        ["tree", "д" * 30],
        ["red", "очень очень красный"],
        ["note", "(note)"],
    ]
    groups, counts = build(pairs, min_characters=2, max_characters=20, max_words=2)
    assert groups == [("apple", "яблоко"), ("house", "дом")]
    assert counts == {
        rules.READ: 9,
        rules.EMPTY: 1,
        rules.WRONG_SCRIPT: 2,
        rules.SHORT: 1,
        rules.LONG: 1,
        rules.MANY_WORDS: 1,
        rules.DUPLICATE: 1,
        rules.NOTES: 2,
    }
    groups, counts = build(pairs, notes=False, scripts=False)
    assert len(groups) == 9 and ("house", "дом (здание)") in groups and set(counts) == {rules.READ}


def test_a_clean_word_may_come_before_or_after_its_dirty_forms():
    words = ["house (n)", "house", "house [x]", "(house", "house"]
    for order in (words, words[::-1], ["house", *words]):
        assert build([[word, "дом"] for word in order])[0] == [("house", "дом")]


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"min_characters": 0}, ("--min-characters is 0", "1 or more")),
        ({"max_words": 0}, ("--max-words is 0",)),
        ({"min_characters": 9, "max_characters": 8}, ("--max-characters is 8", "9 (--min-characters)")),
    ],
)
def test_invalid_settings(fields, facts):
    with user_error(*facts):
        Cleaning(**fields)
