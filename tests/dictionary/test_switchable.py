"""Keys and candidates of a table selected by a recipe's `code_switch` section."""

from dataclasses import replace

import numpy as np
import pytest
from support.dictionary_files import add_entries
from support.messages import user_error

from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.switchable import check_table, select_keys
from megatron_prealign.dictionary.table import TENSORS, DictionaryTable, find_problem
from megatron_prealign.recipe import CodeSwitchSection

EN_DE = [["apple", "apfel"], ["house", "Haus"], ["house", "rot"], ["bank", "Bank"], ["bank", "ufer"], ["it", "Es"]]
FR_DE = [["maison", "Haus"], ["été", "Sommer"]]


@pytest.fixture(scope="module")
def table(tokenizer) -> DictionaryTable:
    builder = GroupBuilder()
    add_entries(builder, EN_DE, ("en", "de"))
    add_entries(builder, FR_DE, ("fr", "de"))
    return build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())


def select(table: DictionaryTable, **fields: object) -> DictionaryTable:
    selected = select_keys(table, CodeSwitchSection(ratio=0.1, **fields))
    assert find_problem(selected) is None
    for name in TENSORS:
        if not name.startswith(("key_", "candidate_")):
            assert np.array_equal(getattr(selected, name), getattr(table, name)), name
    return selected


def texts(table: DictionaryTable, tokenizer) -> dict[str, list[str]]:
    """Text of every key with the texts of its candidates, including leading spaces."""

    def spell(tokens: np.ndarray, offsets: np.ndarray, row: int) -> str:
        return tokenizer.decode(tokens[slice(*offsets[row : row + 2])].tolist())

    return {
        spell(table.key_tokens, table.key_offsets, key): [
            spell(table.candidate_tokens, table.candidate_offsets, candidate)
            for candidate in range(*table.key_candidate_offsets[key : key + 2])
        ]
        for key in range(table.num_keys)
    }


def sources(table: DictionaryTable) -> set[str]:
    return {table.group_words(group)[0][1] for group in table.key_group.tolist()}


def test_the_default_section_does_not_change_the_table(table):
    selected = select(table)
    assert all(np.array_equal(getattr(selected, name), getattr(table, name)) for name in TENSORS)


def test_source_languages(table):
    assert sources(select(table, source_languages=["fr"])) == {"maison", "été"}
    both = select(table, source_languages=["fr", "en"])
    assert np.array_equal(both.key_tokens, table.key_tokens)
    # German words are only translations.
    for unknown in ("de", "it"):
        with user_error(f"code_switch.source_languages has {unknown},", ": en, fr;"):
            select(table, source_languages=["en", unknown])


def test_word_length_counts_characters(table):
    # été is three characters of five bytes.
    assert sources(select(table, max_word_length=3)) == {"it", "été"}
    assert sources(select(table, min_word_length=3, max_word_length=4)) == {"été", "bank"}
    assert sources(select(table, min_word_length=6)) == {"maison"}
    with user_error(f"none of the {table.num_keys} keys", "min_word_length 7,"):
        select(table, min_word_length=7)


def test_word_length_of_one_and_of_characters_of_three_bytes(tokenizer):
    builder = GroupBuilder()
    add_entries(builder, [["ở", "in"], ["cỏ", "Gras"], ["bạn", "du"]], ("vi", "de"))
    table = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    assert sources(table) == {"ở", "cỏ", "bạn"}
    assert sources(select(table, min_word_length=2)) == {"cỏ", "bạn"}
    assert sources(select(table, max_word_length=2)) == {"ở", "cỏ"}


def test_exact_matches_only_the_spelling_of_the_dictionary(table, tokenizer):
    full, exact = texts(table, tokenizer), texts(select(table, case="exact"), tokenizer)
    words = {word for word, _ in EN_DE + FR_DE}
    assert set(exact) == {space + word for word in words for space in ("", " ")} & set(full)
    assert all(exact[key] == full[key] for key in exact)


def test_keep_uses_the_translation_as_spelled_in_the_dictionary(table, tokenizer):
    kept = texts(select(table, case="keep"), tokenizer)
    assert kept[" Apple"] == kept[" APPLE"] == kept[" apple"] == [" apfel"]
    assert kept["Apple"] == kept["APPLE"] == kept["apple"] == ["apfel"]
    assert kept[" HOUSE"] == [" Haus", " rot"]
    # "Bank" for "Bank" would change nothing, but for "BANK" it does.
    assert kept[" Bank"] == [" ufer"]
    assert kept[" BANK"] == [" Bank", " ufer"]
    assert set(kept) == set(texts(table, tokenizer))


def test_keep_drops_keys_without_other_candidates(tokenizer):
    builder = GroupBuilder()
    add_entries(builder, [["bank", "Bank"], ["bank", "BANK"]], ("en", "de"))
    table = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    assert " BANK" not in texts(table, tokenizer)
    add_entries(builder, [["red", "RED"], ["gold", "gold"]], ("en", "de"))
    table = build_table(builder.build(), tokenizer, BuildSettings(drop_identical=False), BuildReport())
    kept = texts(select(table, case="keep"), tokenizer)
    assert " RED" not in kept and kept[" Red"] == [" RED"]
    # "gold" is spelled as in the dictionary and keeps its candidates.
    assert kept["gold"] == kept["Gold"] == ["gold"]


def without(table: DictionaryTable, key: int) -> DictionaryTable:
    return table.with_keys(np.delete(np.arange(table.num_keys), key))


def test_keep_needs_a_partner_with_the_same_group_and_leading_space(table, tokenizer):
    first = [*texts(table, tokenizer)].index(" apple")
    kept = texts(select(without(table, first), case="keep"), tokenizer)
    assert " Apple" not in kept and " APPLE" not in kept
    assert kept["Apple"] == ["apfel"]


def test_keep_takes_the_first_of_several_partners(table, tokenizer):
    names = [*texts(table, tokenizer)]
    # " HOUSE" becomes a second key with the dictionary's case, after or before " house".
    form = table.key_form.copy()
    form[names.index(" HOUSE")] = form[names.index(" house")]
    doubled = replace(table, key_form=form)
    kept = texts(select(doubled, case="keep"), tokenizer)
    assert kept[" House"] == [" Haus", " rot"]
    assert kept[" HOUSE"] == [" HAUS", " ROT"]
    order = np.arange(table.num_keys)
    swap = [names.index(" HOUSE"), names.index(" house")]
    order[swap] = order[swap[::-1]]
    kept = texts(select(doubled.with_keys(order), case="keep"), tokenizer)
    assert kept[" House"] == [" HAUS", " ROT"]
    # A key of another source language is not a partner.
    language = table.key_language.copy()
    language[names.index(" house")] = table.language_id("fr")
    kept = texts(select(replace(table, key_language=language), case="keep"), tokenizer)
    assert " House" not in kept


def test_uniform_weights(table):
    weighted = replace(table, candidate_weight=np.arange(1, table.num_candidates + 1, dtype=np.float32))
    assert np.array_equal(select(weighted).candidate_weight, weighted.candidate_weight)
    uniform = select(weighted, candidate_weights="uniform").candidate_weight
    assert uniform.dtype == np.float32 and (uniform == 1).all()
    # Weights stay with their candidates.
    exact = select(weighted, case="exact")
    index = [weighted.candidate_weight.tolist().index(weight) for weight in exact.candidate_weight.tolist()]
    assert np.array_equal(exact.candidate_language, weighted.candidate_language[index])
    assert len(index) == len(set(index)) == exact.num_candidates < weighted.num_candidates


def test_languages_without_a_weight_are_dropped(tokenizer):
    builder = GroupBuilder()
    add_entries(builder, [["apple", "apfel"], ["house", "Haus"]], ("en", "de"))
    add_entries(builder, [["house", "maison"]], ("en", "fr"))
    table = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    german = texts(select(table, language_weights={"de": 2.0}), tokenizer)
    assert german[" house"] == [" Haus"] and german[" apple"] == [" apfel"]
    french = texts(select(table, language_weights={"fr": 1.0}), tokenizer)
    assert french[" house"] == [" maison"] and " apple" not in french
    with user_error("none of the", "language_weights of en"):
        select(table, language_weights={"en": 1.0})


def test_check_table(table):
    def check(languages: tuple[str, ...] = ("en", "de"), **fields: object) -> None:
        check_table(table, CodeSwitchSection(ratio=0.1, **fields), languages)

    check()
    check(source_languages=["en"], case="keep")
    with user_error("no word would be switched", "words of en, fr,", "data is in de;"):
        check(("de",))
    with user_error("words of fr (code_switch.source_languages)", "data is in en, de;"):
        check(source_languages=["fr"])
    with user_error("code_switch.source_languages has de"):
        check(source_languages=["de"])
    with user_error("min_word_length 9"):
        select(table, min_word_length=9)
    with user_error("none of the 0 keys"):
        check_table(table.with_keys(np.zeros(0, dtype=np.int64)), CodeSwitchSection(ratio=0.1), ("en",))
