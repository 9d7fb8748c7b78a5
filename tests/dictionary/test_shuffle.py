"""The shuffled control of a table, compared with a description of the table in plain Python."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.dictionary_files import add_entries
from support.messages import assert_refused, user_error

from megatron_prealign.cli import main
from megatron_prealign.dictionary import shuffle as module
from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.shuffle import shuffle_table
from megatron_prealign.dictionary.table import FORM_CASE, FORM_WORD_INITIAL, DictionaryTable, find_problem, load_table
from megatron_prealign.text import plural
from megatron_prealign.tokenizer.base import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(random: np.random.Generator, prefix: str) -> str:
    """A word that occurs once, so that a translation tells whose it is."""
    return prefix + "".join(random.choice(list(LETTERS), random.integers(4, 9)))


@pytest.fixture(scope="module")
def table(tokenizer: Tokenizer) -> DictionaryTable:
    """120 words of en with up to three words of de and fr, some without one of them, and 30 words of de with en."""
    random = np.random.default_rng(5)
    builder = GroupBuilder()
    for number in range(120):
        source = word(random, "e") + ("" if number % 3 else "X")
        for language, share in (("de", 0.8), ("fr", 0.6)):
            if random.random() < share or (language == "de" and number < 40):
                pairs = [[source, word(random, language[0])] for _ in range(random.integers(1, 4))]
                add_entries(builder, pairs, ("en", language))
    add_entries(builder, [[word(random, "q"), word(random, "z")] for _ in range(30)], ("de", "en"))
    # A word that shares a translation with the next one, and one that differs by case alone.
    add_entries(
        builder, [["big", "dgross"], ["large", "dgross"], ["large", "dgrande"], ["Big", "dbigger"]], ("en", "de")
    )
    built = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    counts = np.random.default_rng(6).integers(0, 500, built.num_groups)
    return replace(built, group_count=counts)


Translations = dict[str, tuple[tuple[str, tuple[int, ...]], ...]]


def translations(table: DictionaryTable) -> dict[tuple[str, str], Translations]:
    """(language, source word) -> target language -> its words with their tokens, in order."""
    result = {}
    for group in range(table.num_groups):
        begin, end = table.group_offsets[group : group + 2].tolist()
        source, *targets = table.group_words(group)
        by_language: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        for place, (language, text) in enumerate(targets, start=begin + 1):
            tokens = tuple(table.word_tokens[table.word_offsets[place] : table.word_offsets[place + 1]].tolist())
            by_language.setdefault(language, []).append((text, tokens))
        assert end - begin == 1 + len(targets)
        result[source] = {language: tuple(words) for language, words in by_language.items()}
    assert len(result) == table.num_groups
    return result


def keys(table: DictionaryTable) -> dict[tuple[str, tuple[int, ...]], tuple[int, int, dict[str, list[object]]]]:
    """(language, tokens) of a key -> its group, spelling and candidates by language."""
    result = {}
    for key in range(table.num_keys):
        tokens = tuple(table.key_tokens[table.key_offsets[key] : table.key_offsets[key + 1]].tolist())
        candidates: dict[str, list[object]] = {}
        for each in range(*table.key_candidate_offsets[key : key + 2].tolist()):
            begin, end = table.candidate_offsets[each : each + 2].tolist()
            found = (tuple(table.candidate_tokens[begin:end].tolist()), float(table.candidate_weight[each]))
            candidates.setdefault(table.languages[table.candidate_language[each]], []).append(found)
        name = (table.languages[table.key_language[key]], tokens)
        result[name] = (int(table.key_group[key]), int(table.key_form[key]), candidates)
    return result


def donors(before: DictionaryTable, after: DictionaryTable) -> dict[tuple[str, str, str], tuple[str, str]]:
    """(language and text of a word, target language) -> the word whose translations it has."""
    true = translations(before)
    return {
        (*source, language): next(
            other for other, there in true.items() if there.get(language) == words and other[0] == source[0]
        )
        for source, by_language in translations(after).items()
        for language, words in by_language.items()
    }


def test_every_word_has_the_translations_of_another_one(table: DictionaryTable) -> None:
    shuffled, report = shuffle_table(table, 3)
    assert find_problem(shuffled) is None
    true, found = translations(table), translations(shuffled)
    assert list(found) == list(true)
    assert np.array_equal(shuffled.group_count, table.group_count)
    assert report.moved == sum(map(len, true.values())) and report.kept == 0
    given = donors(table, shuffled)
    for source, by_language in found.items():
        assert by_language.keys() == true[source].keys()
        for language, words in by_language.items():
            assert not {text for text, _ in words} & {text for text, _ in true[source][language]}
            assert given[(*source, language)][1].casefold() != source[1].casefold()
        # Words of two target languages are no translations of each other either.
        if len(by_language) == 2:
            assert given[(*source, "de")] != given[(*source, "fr")]
    for language in ("de", "fr", "en"):
        used, expected = (
            Counter(by_language[language] for by_language in each.values() if language in by_language)
            for each in (found, true)
        )
        assert used == expected


def test_candidates_are_those_of_the_same_words_in_the_same_spelling(table: DictionaryTable) -> None:
    shuffled, _ = shuffle_table(table, 3)
    before, after, given = keys(table), keys(shuffled), donors(table, shuffled)
    sources = list(translations(table))
    spellings: dict[tuple[str, str, str], dict[int, list[object]]] = {}
    for group, form, candidates in before.values():
        for language, found in candidates.items():
            spellings.setdefault((*sources[group], language), {}).setdefault(form, found)
    assert before.keys() == after.keys()
    nearest = 0
    for key, (group, form, candidates) in after.items():
        assert before[key][:2] == (group, form)
        assert candidates.keys() == before[key][2].keys()
        for language, found in candidates.items():
            of_donor = spellings[(*given[(*sources[group], language)], language)]
            if form in of_donor:
                assert found == of_donor[form], key
            else:
                nearest += 1
                # In the same place of a text if there is such a spelling.
                same_place = {each for each in of_donor if each & FORM_WORD_INITIAL == form & FORM_WORD_INITIAL}
                allowed = same_place or set(of_donor)
                assert found in [of_donor[each] for each in allowed], key
                if 0 in {each & FORM_CASE for each in allowed} and form & FORM_CASE:
                    assert found in [of_donor[each] for each in allowed if not each & FORM_CASE], key
    assert nearest


def test_translations_are_alike(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the translations are short and half are long; counts are from 0 to 10,000."""
    random = np.random.default_rng(1)
    builder = GroupBuilder()
    pairs = [["e" + word(random, ""), "".join(random.choice(list(LETTERS), 2 + 10 * (n % 2)))] for n in range(600)]
    add_entries(builder, pairs, ("en", "de"))
    built = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    built = replace(built, group_count=(10 ** random.uniform(0, 4, built.num_groups)).astype(np.int64))
    shuffled, report = shuffle_table(built, 0)
    length = {text: len(tokens) for by in translations(built).values() for text, tokens in by["de"]}
    pairs_of = zip(translations(built).values(), translations(shuffled).values(), strict=True)
    equal = [length[before["de"][0][0]] == length[after["de"][0][0]] for before, after in pairs_of]
    assert report.equal_tokens == pytest.approx(np.mean(equal), rel=1e-12)
    # Translations that move anywhere are much less alike (seeded: 0.55 and 0.12, here 0.94 and 0.74).
    monkeypatch.setattr(module, "_WINDOW", 10**6)
    _, anywhere = shuffle_table(built, 0)
    assert report.equal_tokens > 1.5 * anywhere.equal_tokens > 0
    assert report.similar_counts > 1.5 * anywhere.similar_counts > 0


def test_seeds(table: DictionaryTable) -> None:
    first, again, other = (shuffle_table(table, seed)[0] for seed in (1, 1, 2))
    assert first.switching_fingerprint() == again.switching_fingerprint() != other.switching_fingerprint()
    assert translations(first) == translations(again) != translations(other)


def test_a_table_knows_that_it_is_shuffled(table: DictionaryTable, tmp_path: Path) -> None:
    assert table.shuffled is None
    shuffle_table(table, 4)[0].save(tmp_path / "control.safetensors")
    loaded = load_table(tmp_path / "control.safetensors")
    assert loaded.shuffled == {
        "seed": 4,
        "original": table.switching_fingerprint(),
        "kept": 0,
        "held_out_fraction": 0.0,
    }
    with user_error("control.safetensors", "shuffled"):
        shuffle_table(loaded, 4)


def test_held_out_words_exchange_among_each_other(table: DictionaryTable) -> None:
    """A control that trains the translations of held-out words, as those of other words, is none for these words."""

    def trained_translations(given: DictionaryTable) -> set[str]:
        kept = ~table.held_out_groups(0.3)
        groups = zip(translations(given).values(), kept.tolist(), strict=True)
        return {text for by, keep in groups if keep for words in by.values() for text, _ in words}

    true = translations(table)
    shuffled, report = shuffle_table(table, 3, held_out_fraction=0.3)
    assert find_problem(shuffled) is None
    assert report.moved == sum(map(len, true.values())) and report.kept == 0
    assert trained_translations(shuffled) == trained_translations(table)
    assert all(found != words for found, words in zip(translations(shuffled).values(), true.values(), strict=True))
    assert trained_translations(shuffle_table(table, 3)[0]) - trained_translations(table)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_noise_in_a_share_of_the_words(table: DictionaryTable, share: float) -> None:
    noisy, report = shuffle_table(table, 3, share)
    assert find_problem(noisy) is None
    assert noisy.shuffled is not None and noisy.shuffled["share"] == share and not noisy.is_control
    before, after = translations(table), translations(noisy)
    assert before.keys() == after.keys()
    changed = [word for word in before if before[word] != after[word]]
    # 150 words, each chosen with this probability: within three standard deviations, less the few that cannot move.
    deviation = 3 * np.sqrt(share * (1 - share) / len(before))
    assert abs(len(changed) / len(before) - share) < deviation
    # Translations are exchanged among the chosen words, so each is still used as often as before.
    for language in table.languages:
        uses = [
            Counter(text for by_language in each.values() for text in by_language.get(language, ()))
            for each in (before, after)
        ]
        assert uses[0] == uses[1]
    assert len(changed) <= report.moved
    control, _ = shuffle_table(table, 3)
    assert control.is_control and not table.is_control


def test_words_without_an_alternative_keep_their_translations(tokenizer: Tokenizer) -> None:
    def built(*pairs: list[str]) -> DictionaryTable:
        builder = GroupBuilder()
        add_entries(builder, [*pairs], ("en", "de"))
        return build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())

    for pairs in ([["red", "rot"]], [["red", "rot"], ["ruby", "rot"]], [["red", "rot"], ["Red", "Haus"]]):
        with user_error(f"got {plural(len(pairs), 'group')} to", "two or more words") as caught:
            shuffle_table(built(*pairs), 0)
        assert "--share" not in str(caught.value)
    with user_error("got 0 groups", "raise --share"):
        shuffle_table(built(["red", "rot"], ["house", "Haus"]), 0, 1e-9)
    shuffled, report = shuffle_table(built(["red", "rot"], ["ruby", "rot"], ["house", "Haus"]), 0)
    assert (report.moved, report.kept) == (2, 1)
    assert find_problem(shuffled) is None


def test_every_list_of_translations_is_given_to_one_word(tokenizer: Tokenizer) -> None:
    """Also if words keep theirs, since few translations differ."""
    kept = []
    for seed in range(40):
        random = np.random.default_rng(seed)
        builder = GroupBuilder()
        for _ in range(12):
            source, common = word(random, "e"), ("rot", "grau", "blau")[random.choice(3, p=[0.6, 0.2, 0.2])]
            add_entries(builder, [[source, common], [source, word(random, "d")]], ("en", "de"))
        original = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
        shuffled, report = shuffle_table(original, seed)
        before, after = translations(original), translations(shuffled)
        assert Counter(given["de"] for given in after.values()) == Counter(true["de"] for true in before.values())
        assert report.kept == sum(before[word] == after[word] for word in before)
        kept.append(report.kept)
    assert 0 in kept and max(kept) > 1


def test_the_command(table: DictionaryTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, control = tmp_path / "table.safetensors", tmp_path / "control.safetensors"
    table.save(path)
    arguments = ["dictionary", "shuffle", "--table", str(path), "--output", str(control), "--seed", "7"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "7" in printed and str(control) in printed.splitlines()[-1]
    expected, _ = shuffle_table(table, 7, held_out_fraction=0.05)
    assert load_table(control).switching_fingerprint() == expected.switching_fingerprint()
    assert main([*arguments, "--held-out-fraction", "0.5"]) == 0
    shuffled = load_table(control).shuffled
    assert shuffled is not None and shuffled["held_out_fraction"] == 0.5
    capsys.readouterr()
    content = path.read_bytes()
    assert_refused(main([*arguments[:4], "--output", str(path)]), capsys.readouterr().err, path, "--output")
    assert_refused(main([*arguments, "--seed", "-1"]), capsys.readouterr().err, "--seed is -1")
    wrong = main([*arguments, "--held-out-fraction", "1"])
    assert_refused(wrong, capsys.readouterr().err, "--held-out-fraction is 1", "below 1")
    for share in ("0", "1.5"):
        assert_refused(main([*arguments, "--share", share]), capsys.readouterr().err, f"--share is {float(share)}")
    noisy = str(tmp_path / "noisy.safetensors")
    assert main([*arguments[:5], noisy, "--share", "0.3"]) == 0
    assert f"30% noise in {path}" in capsys.readouterr().out
    assert_refused(
        main([*arguments[:3], str(control), "--output", str(tmp_path / "c")]), capsys.readouterr().err, control
    )
    assert path.read_bytes() == content and not (tmp_path / "c").exists()
