"""From pairs to keys and candidates, on a real tokenizer."""

import numpy as np
from support.dictionary_files import add_entries
from support.messages import user_error

from megatron_prealign.dictionary import build_report as rules
from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.table import HAS_LETTER, TENSORS, DictionaryTable, find_problem
from megatron_prealign.tokenizer.base import Tokenizer


def make(tokenizer: Tokenizer, *lists: tuple[str, list[list[str]]], **settings) -> tuple[DictionaryTable, BuildReport]:
    report = BuildReport()
    builder = GroupBuilder(counts=report.rules)
    for languages, entries in lists:
        add_entries(builder, entries, languages.split("-"))
    table = build_table(builder.build(), tokenizer, BuildSettings(**settings), report)
    assert find_problem(table) is None
    return table, report


def key_rows(table: DictionaryTable) -> list[list[int]]:
    return [table.key_tokens[slice(*table.key_offsets[key : key + 2])].tolist() for key in range(table.num_keys)]


def translations(table: DictionaryTable, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Text of every key with the texts of its candidates, including leading spaces."""
    result = {}
    for key in range(table.num_keys):
        text = tokenizer.decode(table.key_tokens[slice(*table.key_offsets[key : key + 2])].tolist())
        assert text not in result
        result[text] = [
            table.languages[table.candidate_language[candidate]]
            + ":"
            + tokenizer.decode(
                table.candidate_tokens[slice(*table.candidate_offsets[candidate : candidate + 2])].tolist()
            )
            for candidate in range(*table.key_candidate_offsets[key : key + 2])
        ]
    return result


def test_a_word_has_six_keys_whose_candidates_follow_case_and_space(tokenizer):
    table, _ = make(tokenizer, ("en-de", [["apple", "Apfel"], ["red", "rot"]]))
    assert translations(table, tokenizer) == {
        " apple": ["de: Apfel"],
        "apple": ["de:Apfel"],
        " Apple": ["de: Apfel"],
        "Apple": ["de:Apfel"],
        " APPLE": ["de: APFEL"],
        "APPLE": ["de:APFEL"],
        " red": ["de: rot"],
        "red": ["de:rot"],
        " Red": ["de: Rot"],
        "Red": ["de:Rot"],
        " RED": ["de: ROT"],
        "RED": ["de:ROT"],
    }
    forms = {
        form: tokenizer.decode(row) for form, row in zip(table.key_form[:6].tolist(), key_rows(table), strict=False)
    }
    assert forms == {4: " apple", 0: "apple", 5: " Apple", 1: "Apple", 6: " APPLE", 2: "APPLE"}
    # Keys of a group are contiguous.
    assert table.key_group.tolist() == [0] * 6 + [1] * 6


def test_candidates_are_sorted_by_language_and_caseless_scripts_are_unchanged(tokenizer):
    table, _ = make(
        tokenizer,
        ("en-zh", [["bank", "银行"]]),
        ("en-de", [["bank", "Bank"], ["bank", "Ufer"]]),
    )
    assert table.languages == ("en", "zh", "de")
    # The candidate "Bank" is dropped for the key "Bank", because both have the same tokens.
    assert translations(table, tokenizer) == {
        " bank": ["zh: 银行", "de: Bank", "de: Ufer"],
        "bank": ["zh:银行", "de:Bank", "de:Ufer"],
        " Bank": ["zh: 银行", "de: Ufer"],
        "Bank": ["zh:银行", "de:Ufer"],
        " BANK": ["zh: 银行", "de: UFER"],
        "BANK": ["zh:银行", "de:UFER"],
    }
    assert table.group_words(0) == [("en", "bank"), ("zh", "银行"), ("de", "Bank"), ("de", "Ufer")]


def test_spellings_of_the_dictionary_take_precedence_over_derived_ones(tokenizer):
    entries = [["polish", "polieren"], ["Polish", "polnisch"]]
    for order in (entries, entries[::-1]):
        table, report = make(tokenizer, ("en-de", order))
        found = translations(table, tokenizer)
        assert found[" polish"] == ["de: polieren"]
        assert found[" Polish"] == ["de: polnisch"]
        # " Polish" and "Polish" derived from "polish", and POLISH twice.
        assert report.rules[rules.TAKEN_KEY] == 4


def test_identical_tokens_are_dropped_but_a_clone_is_not_identical(tokenizer, clone_tokenizer):
    _, report = make(tokenizer, ("en-de", [["bank", "bank"], ["apple", "Apfel"]]))
    assert report.rules[rules.IDENTICAL] == 1
    table, report = make(clone_tokenizer, ("en-en_clone", [["apple", "apple"], ["house", "house"]]))
    assert report.rules[rules.IDENTICAL] == 0
    offset = clone_tokenizer.vocab_size // 2
    assert table.num_keys == table.num_candidates == 12
    # Every candidate equals its key, shifted to the other half of the vocabulary.
    assert np.array_equal(table.candidate_tokens, table.key_tokens + offset)
    assert np.array_equal(table.candidate_offsets, table.key_offsets)
    kept, report = make(tokenizer, ("en-de", [["bank", "bank"], ["apple", "Apfel"]]), drop_identical=False)
    assert report.rules[rules.IDENTICAL] == 0 and kept.num_groups == 2


def test_words_are_spelled_once_as_inside_a_sentence(tokenizer):
    table, _ = make(tokenizer, ("en-de", [["apple", "Apfel"], ["house", "Haus"], ["house", "das Haus"]]))
    words = [
        tokenizer.decode(table.word_tokens[slice(*table.word_offsets[word : word + 2])].tolist())
        for word in range(table.num_words)
    ]
    assert words == [" apple", " Apfel", " house", " Haus", " das Haus"]
    assert [table.text(word) for word in range(table.num_words)] == ["apple", "Apfel", "house", "Haus", "das Haus"]
    assert table.group_offsets.tolist() == [0, 2, 5]
    assert table.word_language.tolist() == [0, 1, 0, 1, 1]


def weights_of(table: DictionaryTable, tokenizer: Tokenizer) -> dict[str, list[float]]:
    weights = (table.candidate_weight[slice(*table.key_candidate_offsets[k : k + 2])] for k in range(table.num_keys))
    return dict(zip(translations(table, tokenizer), (each.tolist() for each in weights), strict=True))


def test_weights_stay_with_their_candidates(tokenizer):
    report = BuildReport()
    builder = GroupBuilder()
    add_entries(builder, [["apple", "rot"]], ("en", "de"))
    add_entries(builder, [["bank", "Bank"], ["bank", "ufer"], ["bank", "Ufer"]], ("en", "de"), [0.5, 2.0, 3.0])
    add_entries(builder, [["bank", "banque"]], ("en", "fr"), [0.25])
    table = build_table(builder.build(), tokenizer, BuildSettings(), report)
    found, weights = translations(table, tokenizer), weights_of(table, tokenizer)
    assert table.candidate_weight.dtype == np.float32
    assert (found[" apple"], weights[" apple"]) == (["de: rot"], [1.0])
    assert found[" bank"] == ["de: Bank", "de: ufer", "de: Ufer", "fr: banque"]
    assert weights[" bank"] == [0.5, 2.0, 3.0, 0.25]
    # "Bank" for "Bank" is dropped; "ufer" and "Ufer" are merged in these cases and keep the larger weight.
    assert (found[" Bank"], weights[" Bank"]) == (["de: Ufer", "fr: Banque"], [3.0, 0.25])
    assert (found["BANK"], weights["BANK"]) == (["de:UFER", "fr:BANQUE"], [3.0, 0.25])


def test_hash_collisions_are_resolved(tokenizer, monkeypatch):
    entries = [["polish", "polieren"], ["Polish", "polnisch"], ["apple", "Apfel"], ["apple", "apfel"], ["bank", "bank"]]
    expected, report = make(tokenizer, ("en-de", entries), ("de-en", [["Apfel", "apple"]]))
    monkeypatch.setattr(
        "megatron_prealign.dictionary.lexicon.hash_rows", lambda tokens, offsets: np.zeros(len(offsets) - 1, np.uint64)
    )
    table, same_report = make(tokenizer, ("en-de", entries), ("de-en", [["Apfel", "apple"]]))
    assert same_report.rules == report.rules
    assert all(np.array_equal(getattr(table, name), getattr(expected, name)) for name in TENSORS)


def test_many_words_are_encoded_in_batches(tokenizer, monkeypatch):
    entries = [["apple", "Apfel"], ["house", "das Haus"], ["red", "rot"], ["bank", "银行"], ["polish", "polieren"]]
    expected, _ = make(tokenizer, ("en-de", entries))
    monkeypatch.setattr("megatron_prealign.dictionary.lexicon._BATCH", 2)
    table, report = make(tokenizer, ("en-de", entries))
    assert all(np.array_equal(getattr(table, name), getattr(expected, name)) for name in TENSORS)
    assert report.encoder == tokenizer.word_encoder


def test_limits(tokenizer):
    entries = [["bank", f"Bank {letter}"] for letter in "abcdef"]
    table, report = make(tokenizer, ("en-de", entries), ("en-fr", [["bank", "banque"]]), max_translations=2)
    assert table.group_words(0) == [("en", "bank"), ("de", "Bank a"), ("de", "Bank b"), ("fr", "banque")]
    assert (report.rules[rules.SURPLUS], report.rules[rules.KEPT]) == (4, 3)
    long = "x" * 9
    assert len(tokenizer.encode_word(long)) > 8
    table, report = make(
        tokenizer, ("en-de", [["apple", "Apfel"], ["apple", "z" * 9], [long, "Haus"]]), max_target_tokens=8
    )
    assert (report.rules[rules.LONG_SOURCE], report.rules[rules.LONG_TARGET]) == (1, 1)
    assert table.num_groups == 1
    with user_error("--max-translations is 0", "1 or more"):
        BuildSettings(max_translations=0)


def test_limits_apply_to_every_case_variant(tokenizer):
    lengths = {word: len(tokenizer.encode_word(word)) for word in ("Maison", "MAISON", "rougesrouges", "ROUGESROUGES")}
    assert lengths["Maison"] <= 4 < lengths["MAISON"] and lengths["rougesrouges"] <= 8 < lengths["ROUGESROUGES"]
    entries = [["house", "maison"], ["rougesrouges", "Haus"]]
    table, report = make(tokenizer, ("en-fr", entries), max_target_tokens=4)
    assert set(translations(table, tokenizer)) == {
        f"{space}{word}" for word in ("house", "House", "rougesrouges", "Rougesrouges") for space in ("", " ")
    }
    assert (report.rules[rules.EMPTY_KEY], report.rules[rules.SPLIT_KEY]) == (2, 2)


def test_translations_of_a_language_keep_the_order_of_the_files(tokenizer):
    table, _ = make(tokenizer, ("en-de", [["apple", "Haus"], ["bank", "Ufer"], ["bank", "Haus"], ["bank", "rot"]]))
    assert translations(table, tokenizer)[" bank"] == ["de: Ufer", "de: Haus", "de: rot"]


def test_words_the_tokenizer_does_not_know_are_dropped(metaspace_tokenizer):
    entries = [["apple", "Apfel"], ["apple", "تفاح"], ["ظ", "Haus"]]
    # Unknown languages, so that the script rule does not drop the words.
    table, report = make(metaspace_tokenizer, ("x-y", entries))
    assert report.rules[rules.UNKNOWN] == 2
    assert table.num_groups == 1
    for name in ("key_tokens", "candidate_tokens", "word_tokens"):
        assert not np.isin(getattr(table, name), list(metaspace_tokenizer.special_ids)).any()


def test_a_source_that_is_two_words_to_the_tokenizer_has_no_key_but_stays_for_alignment(tokenizer):
    # "-" has a boundary on both sides, "'s" only before it.
    entries = [["e-mail", "Brief"], ["it's", "es"], ["apple", "Apfel"]]
    table, report = make(tokenizer, ("en-de", entries))
    assert table.num_groups == 3
    assert set(table.key_group.tolist()) == {2}
    assert report.rules[rules.KEYLESS] == 2
    assert report.rules[rules.SPLIT_KEY] == 12


def test_a_separate_space_token_is_not_part_of_a_key(tokenizer):
    space = tokenizer.encode_word("")
    assert tokenizer.encode_word("żaba") == [*space, *tokenizer.encode_word("żaba", word_initial=False)]
    table, report = make(tokenizer, ("pl-de", [["żaba", "Haus"]]))
    # Three cases, each matching both " żaba" and "(żaba".
    assert translations(table, tokenizer) == {"żaba": ["de:Haus"], "Żaba": ["de:Haus"], "ŻABA": ["de:HAUS"]}
    assert (report.rules[rules.MARKED_KEY], report.rules[rules.SPLIT_KEY]) == (3, 0)


def test_letters_are_marked(tokenizer):
    table, _ = make(tokenizer, ("en-de", [["apple", "Apfel"]]))
    for text, letter in (("a", True), (",", False), ("1", False), ("é", True)):
        assert bool(table.word_boundary[tokenizer.encode(text)[0]] & HAS_LETTER) == letter
    assert not table.word_boundary[tokenizer.eod_id] & HAS_LETTER
    assert np.array_equal(table.word_boundary & 3, tokenizer.word_boundaries())


def test_an_empty_dictionary_is_an_error_with_reasons(tokenizer):
    with user_error("no pairs remain", f"1 {rules.IDENTICAL}"):
        make(tokenizer, ("en-de", [["bank", "bank"]]))
    with user_error("no pairs remain", "none were read"):
        build_table(GroupBuilder().build(), tokenizer, BuildSettings(), BuildReport())
    report = BuildReport()
    report.errors.add("a.tsv:1: got 1 column")
    with user_error("no pairs remain", "1 line skipped", "a.tsv:1: got 1 column"):
        build_table(GroupBuilder().build(), tokenizer, BuildSettings(), report)
