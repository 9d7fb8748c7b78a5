"""Saving, loading, checking and filtering a table."""

import os
from dataclasses import replace

import numpy as np
import pytest
from support.dictionary_files import add_entries
from support.messages import assert_facts, user_error

from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.ragged import row_indices
from megatron_prealign.dictionary.table import TENSORS, DictionaryTable, find_problem, load_table

PAIRS = [["apple", "Apfel"], ["house", "Haus"], ["house", "Gebäude"], ["red", "rot"], ["Polish", "polnisch"]]


@pytest.fixture(scope="module")
def table(tokenizer) -> DictionaryTable:
    builder = GroupBuilder()
    add_entries(builder, PAIRS, ("en", "de"))
    sources = [{"path": "a.tsv", "pairs": len(PAIRS), "licence": "GPL-2+"}]
    return build_table(builder.build(), tokenizer, BuildSettings(), BuildReport(), sources=sources)


def same(left: DictionaryTable, right: DictionaryTable) -> bool:
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in TENSORS)


def test_round_trip(table, tmp_path):
    path = tmp_path / "new" / "table.safetensors"
    table.save(path)
    loaded = load_table(path)
    assert same(loaded, table)
    for name in ("languages", "tokenizer_fingerprint", "vocab_size", "sources"):
        assert getattr(loaded, name) == getattr(table, name)
    assert loaded.path == path
    # No temporary files remain, and the permissions follow the umask.
    assert os.listdir(path.parent) == ["table.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_equal_tables_give_identical_files(table, tmp_path):
    sources = tuple({"path": f"Wörter {number}\n.tsv", "pairs": number} for number in range(3))
    for number in range(5):
        replace(table, sources=sources).save(tmp_path / f"{number}")
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(5)}) == 1
    assert load_table(tmp_path / "0").sources == sources


def test_unwritable_output(table, tmp_path):
    (tmp_path / "file").write_text("")
    with user_error(f"{tmp_path}/file is a file"):
        table.save(tmp_path / "file" / "table.safetensors")


def test_other_and_corrupt_files(table, tmp_path):
    path = tmp_path / "table.safetensors"
    with user_error(path, "does not exist"):
        load_table(path)
    path.write_text("hello")
    with user_error(path, "not a valid dictionary table"):
        load_table(path)
    table.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with user_error(path, "not a valid dictionary table"):
        load_table(path)
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3)}, path)
    with user_error(path, "format_version is None", "word_boundary", "group_count"):
        load_table(path)


def test_another_format_version(table, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prealign.dictionary.table.FORMAT_VERSION", "1")
    table.save(tmp_path / "t")
    monkeypatch.undo()
    with user_error(tmp_path / "t", "format_version is 1"):
        load_table(tmp_path / "t")


def changed(array: np.ndarray, index: int, value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("name", "index", "value", "fact"),
    [
        ("key_tokens", 0, 10**6, "to 1000000"),
        ("candidate_tokens", 0, -1, "from -1"),
        ("word_tokens", 3, 10**6, "to 1000000"),
        ("key_offsets", 1, 0, "does not increase"),
        ("key_offsets", -1, 10**6, "does not increase"),
        ("key_candidate_offsets", 1, 0, "does not increase"),
        ("word_text_offsets", 0, 1, "does not increase"),
        ("group_offsets", 1, 1, "does not increase"),
        ("key_language", 0, 2, "from 0 to 2, expected 0 to 1"),
        ("key_group", 0, 99, "to 99"),
        ("candidate_weight", 0, 0, "above 0"),
        ("group_count", 0, -1, "-1, expected 0 or more"),
        ("key_form", 0, 3, "expected 0, 1, 2, 4, 5 or 6"),
        ("key_form", 0, 8, "expected 0, 1, 2, 4, 5 or 6"),
    ],
)
def test_invalid_contents(table, tmp_path, name, index, value, fact):
    broken = replace(table, **{name: changed(getattr(table, name), index, value)})
    broken.save(tmp_path / "t")
    with user_error(tmp_path / "t", "of format 2", f": {name} ", fact):
        load_table(tmp_path / "t")


def test_text_offset_inside_a_character(table, tmp_path):
    # The ä of Gebäude has two bytes.
    cut = int(np.flatnonzero(table.word_text == "ä".encode()[1])[0])
    word = int(np.flatnonzero(table.word_text_offsets > cut)[0]) - 1
    broken = replace(table, word_text_offsets=changed(table.word_text_offsets, word, cut))
    assert_facts(find_problem(broken) or "", "word_text_offsets", "character")
    assert "not valid UTF-8" in (find_problem(replace(table, word_text=changed(table.word_text, cut, 255))) or "")


@pytest.mark.parametrize(
    ("key", "value", "facts"),
    [
        ("languages", '["en", null]', ("languages is ", "expected a list")),
        ("sources", '["a"]', ("sources is ", "expected a list")),
        ("languages", '"en"', ("languages is ", "expected a list")),
        ("sources", '[{"pairs": "5"}]', ('"pairs" in sources', "integer")),
        ("build", "[]", ("build is ", "settings and rules")),
        ("build", '{"rules": 5}', ("build is ", "settings and rules")),
        ("build", '{"settings": null}', ("build is ", "settings and rules")),
        ("build", '{"rules": {"pairs read": "5"}}', ("counts in build", "integer")),
        ("build", '{"lines_skipped": []}', ("counts in build", "integer")),
    ],
)
def test_metadata_of_other_types(table, tmp_path, key, value, facts):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    table.save(tmp_path / "t")
    with safe_open(tmp_path / "t", framework="numpy") as file:
        metadata = file.metadata() | {key: value}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "t", metadata)
    with user_error(tmp_path / "t", *facts):
        load_table(tmp_path / "t")


def test_broken_shapes_types_and_keys(table):
    assert "vocab" not in (find_problem(table) or "")
    assert "word_boundary has" in (find_problem(replace(table, vocab_size=table.vocab_size + 1)) or "")
    assert "key_group has" in (find_problem(replace(table, key_group=table.key_group[:-1])) or "")
    assert "key_form has" in (find_problem(replace(table, key_form=table.key_form[:-1])) or "")
    problem = find_problem(replace(table, key_tokens=table.key_tokens.astype(np.int64))) or ""
    assert_facts(problem, "key_tokens is int64", "expected", "int32")
    # A comma inside a key makes two words.
    longest = int(np.argmax(np.diff(table.key_offsets)))
    second = int(table.key_offsets[longest]) + 1
    comma = int(np.flatnonzero(table.word_boundary == 3)[1])
    broken = replace(table, key_tokens=changed(table.key_tokens, second, comma))
    assert "a word starts inside a key" in (find_problem(broken) or "")


def test_candidates_must_be_sorted_by_language(table):
    two = int(np.flatnonzero(np.diff(table.key_candidate_offsets) == 2)[0])
    first = int(table.key_candidate_offsets[two])
    broken = replace(table, candidate_language=changed(table.candidate_language, first + 1, 0))
    assert_facts(find_problem(broken) or "", "candidate_language", "sorted", f"candidate {first + 1}")
    # The first candidate of the next key may be of any language.
    fine = replace(table, candidate_language=changed(table.candidate_language, first, 0))
    assert find_problem(fine) is None


def test_another_tokenizer_is_rejected_with_both_fingerprints(table):
    table.check_tokenizer(table.tokenizer_fingerprint)
    with user_error(table.tokenizer_fingerprint, "sha256:other"):
        table.check_tokenizer("sha256:other")


def test_held_out_groups_depend_only_on_the_source_word(tokenizer):
    words = [first + second + third for first in "abcdefghij" for second in "aeiou" for third in "lmnrst"]

    def held_out(pairs: list[list[str]], fraction: float, language: str = "de") -> set[str]:
        builder = GroupBuilder()
        add_entries(builder, pairs, ("en", language))
        table = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
        return {table.group_words(int(group))[0][1] for group in np.flatnonzero(table.held_out_groups(fraction))}

    chosen = held_out([[word, "Haus"] for word in words], 0.2)
    # 300 words: five standard deviations around 60 are 25 to 95.
    assert 25 < len(chosen) < 95
    assert held_out([[word, "maison"] for word in reversed(words)], 0.2, "fr") == chosen
    assert chosen < held_out([[word, "Haus"] for word in words], 0.5)
    assert held_out([[word, "Haus"] for word in words], 0.0) == set()
    assert held_out([[word, "Haus"] for word in words], 1.0) == set(words)
    upper = held_out([[word.upper(), "Haus"] for word in words], 0.2)
    assert upper == {word.upper() for word in chosen}


def test_without_groups_drops_only_their_keys(table, tokenizer):
    dropped = np.array([False, True, False, True])
    remaining = table.without_groups(dropped)
    assert find_problem(remaining) is None
    assert set(remaining.key_group.tolist()) == {0, 2}
    # The result equals a dictionary built without those words, except for the group numbers.
    builder = GroupBuilder()
    add_entries(builder, [PAIRS[0], PAIRS[3]], ("en", "de"))
    smaller = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    for name in TENSORS:
        if name.startswith(("key_", "candidate_")) and name != "key_group":
            assert np.array_equal(getattr(remaining, name), getattr(smaller, name)), name
    assert remaining.switching_fingerprint() == smaller.switching_fingerprint() != table.switching_fingerprint()
    assert np.array_equal(remaining.group_offsets, table.group_offsets)
    assert remaining.group_words(1) == table.group_words(1)
    assert same(table.without_groups(np.zeros(4, dtype=bool)), table)
    with pytest.raises(ValueError, match=r"expected bool \(4,\)"):
        table.without_groups(np.zeros(3, dtype=bool))


def test_switching_fingerprint_covers_what_affects_switching(table, tmp_path):
    fingerprint = table.switching_fingerprint()
    table.save(tmp_path / "table.safetensors")
    assert load_table(tmp_path / "table.safetensors").switching_fingerprint() == fingerprint
    for name in TENSORS:
        values = getattr(table, name).copy()
        values[-1] += 1
        other = replace(table, **{name: values})
        switched = name == "word_boundary" or name.startswith(("key_", "candidate_")) and name != "key_group"
        assert (other.switching_fingerprint() != fingerprint) == switched, name
    assert replace(table, languages=("en", "fr")).switching_fingerprint() != fingerprint
    assert table.with_keys(np.arange(0)).switching_fingerprint() != fingerprint


def test_row_indices():
    values = np.arange(10)
    index, offsets = row_indices(np.array([0, 3, 3, 7, 10]), np.array([2, 1, 0, 2]))
    assert values[index].tolist() == [3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]
    assert offsets.tolist() == [0, 4, 4, 7, 11]
