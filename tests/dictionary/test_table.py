"""Saving, loading, checking and thinning out a table."""

import os
from dataclasses import replace

import numpy as np
import pytest

from megatron_prealign.dictionary.build import BuildReport, BuildSettings, build_table
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.ragged import row_indices
from megatron_prealign.dictionary.table import TENSORS, DictionaryTable, find_problem, load_table
from megatron_prealign.errors import UserError

PAIRS = [["apple", "Apfel"], ["house", "Haus"], ["house", "Gebäude"], ["red", "rot"], ["Polish", "polnisch"]]


@pytest.fixture(scope="module")
def table(tokenizer) -> DictionaryTable:
    builder = GroupBuilder()
    builder.add(PAIRS, ("en", "de"))
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
    # Nothing half-written is left, and others may read the file as the umask says.
    assert os.listdir(path.parent) == ["table.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_same_table_is_the_same_file(table, tmp_path):
    sources = tuple({"path": f"Wörter {number}\n.tsv", "pairs": number} for number in range(3))
    for number in range(5):
        replace(table, sources=sources).save(tmp_path / f"{number}")
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(5)}) == 1
    assert load_table(tmp_path / "0").sources == sources


def test_unwritable_output(table, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file is a file"):
        table.save(tmp_path / "file" / "table.safetensors")


def test_foreign_and_damaged_files(table, tmp_path):
    path = tmp_path / "table.safetensors"
    with pytest.raises(UserError, match="no such dictionary table"):
        load_table(path)
    path.write_text("hello")
    with pytest.raises(UserError, match="not a whole dictionary table"):
        load_table(path)
    table.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(UserError, match="not a whole dictionary table"):
        load_table(path)
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(UserError, match="format_version is None, missing tensors are"):
        load_table(path)


def test_another_format_version(table, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_prealign.dictionary.table.FORMAT_VERSION", "1")
    table.save(tmp_path / "t")
    monkeypatch.undo()
    with pytest.raises(UserError, match="format_version is 1"):
        load_table(tmp_path / "t")


def changed(array: np.ndarray, index: int, value: int) -> np.ndarray:
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("key_tokens", 0, 10**6, "key_tokens has values"),
        ("candidate_tokens", 0, -1, "candidate_tokens has values from -1"),
        ("word_tokens", 3, 10**6, "word_tokens has values"),
        ("key_offsets", 1, 0, "key_offsets does not rise"),
        ("key_offsets", -1, 10**6, "key_offsets does not rise"),
        ("key_candidate_offsets", 1, 0, "key_candidate_offsets does not rise"),
        ("word_text_offsets", 0, 1, "word_text_offsets does not rise"),
        ("group_offsets", 1, 1, "group_offsets does not rise "),
        ("key_language", 0, 2, "key_language has values from 0 to 2, expected 0 to 1"),
        ("key_group", 0, 99, "key_group has values"),
        ("candidate_weight", 0, 0, "candidate_weight has a value that is not above 0"),
        ("group_count", 0, -1, "group_count has the value -1"),
        ("key_form", 0, 3, "key_form has a value that names no case"),
        ("key_form", 0, 8, "key_form has a value that names no case"),
    ],
)
def test_every_broken_content_is_found(table, tmp_path, name, index, value, message):
    broken = replace(table, **{name: changed(getattr(table, name), index, value)})
    broken.save(tmp_path / "t")
    with pytest.raises(UserError, match=f"not a whole dictionary table of format 2: {message}"):
        load_table(tmp_path / "t")


def test_text_cut_through_a_character(table, tmp_path):
    # The ä of Gebäude has two bytes.
    cut = int(np.flatnonzero(table.word_text == "ä".encode()[1])[0])
    word = int(np.flatnonzero(table.word_text_offsets > cut)[0]) - 1
    broken = replace(table, word_text_offsets=changed(table.word_text_offsets, word, cut))
    assert find_problem(broken) == "word_text_offsets cuts through a character"
    assert "not valid UTF-8" in (find_problem(replace(table, word_text=changed(table.word_text, cut, 255))) or "")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("languages", '["en", null]', "languages is .*, expected a list"),
        ("sources", '["a"]', "sources is .*, expected a list"),
        ("languages", '"en"', "languages is .*, expected a list"),
        ("sources", '[{"pairs": "5"}]', "sources has a number of pairs that is none"),
        ("build", "[]", "build is .*, expected an object of settings and rules"),
        ("build", '{"rules": 5}', "build is .*, expected an object of settings and rules"),
        ("build", '{"settings": null}', "build is .*, expected an object of settings and rules"),
        ("build", '{"rules": {"pairs read": "5"}}', "build has a count that is no number"),
        ("build", '{"lines_skipped": []}', "build has a count that is no number"),
    ],
)
def test_metadata_of_other_types(table, tmp_path, key, value, message):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    table.save(tmp_path / "t")
    with safe_open(tmp_path / "t", framework="numpy") as file:
        metadata = file.metadata() | {key: value}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "t", metadata)
    with pytest.raises(UserError, match=message):
        load_table(tmp_path / "t")


def test_broken_shapes_types_and_keys(table):
    assert "vocab" not in (find_problem(table) or "")
    assert "word_boundary has" in (find_problem(replace(table, vocab_size=table.vocab_size + 1)) or "")
    assert "key_group has" in (find_problem(replace(table, key_group=table.key_group[:-1])) or "")
    assert "key_form has" in (find_problem(replace(table, key_form=table.key_form[:-1])) or "")
    assert "expected int32" in (find_problem(replace(table, key_tokens=table.key_tokens.astype(np.int64))) or "")
    # A comma inside a key: two words.
    longest = int(np.argmax(np.diff(table.key_offsets)))
    second = int(table.key_offsets[longest]) + 1
    comma = int(np.flatnonzero(table.word_boundary == 3)[1])
    broken = replace(table, key_tokens=changed(table.key_tokens, second, comma))
    assert "a word starts inside a key" in (find_problem(broken) or "")


def test_candidates_must_be_sorted_by_language(table):
    two = int(np.flatnonzero(np.diff(table.key_candidate_offsets) == 2)[0])
    first = int(table.key_candidate_offsets[two])
    broken = replace(table, candidate_language=changed(table.candidate_language, first + 1, 0))
    assert find_problem(broken) == f"candidate_language is not sorted within a key, at candidate {first + 1}"
    # The first candidate of the next key may be of any language.
    fine = replace(table, candidate_language=changed(table.candidate_language, first, 0))
    assert find_problem(fine) is None


def test_another_tokenizer_is_refused_by_both_names(table):
    table.check_tokenizer(table.tokenizer_fingerprint)
    with pytest.raises(UserError) as error:
        table.check_tokenizer("sha256:other")
    assert table.tokenizer_fingerprint in str(error.value) and "sha256:other" in str(error.value)


def test_held_out_groups_depend_on_the_source_word_alone(tokenizer):
    words = [first + second + third for first in "abcdefghij" for second in "aeiou" for third in "lmnrst"]

    def held_out(pairs: list[list[str]], fraction: float, language: str = "de") -> set[str]:
        builder = GroupBuilder()
        builder.add(pairs, ("en", language))
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


def test_without_groups_drops_their_keys_and_nothing_else(table, tokenizer):
    dropped = np.array([False, True, False, True])
    left = table.without_groups(dropped)
    assert find_problem(left) is None
    assert set(left.key_group.tolist()) == {0, 2}
    # What is left is what a dictionary without those words gives, apart from the groups' numbers.
    builder = GroupBuilder()
    builder.add([PAIRS[0], PAIRS[3]], ("en", "de"))
    smaller = build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())
    for name in TENSORS:
        if name.startswith(("key_", "candidate_")) and name != "key_group":
            assert np.array_equal(getattr(left, name), getattr(smaller, name)), name
    assert left.switching_digest() == smaller.switching_digest() != table.switching_digest()
    assert np.array_equal(left.group_offsets, table.group_offsets)
    assert left.group_words(1) == table.group_words(1)
    assert same(table.without_groups(np.zeros(4, dtype=bool)), table)
    with pytest.raises(ValueError, match=r"expected bool \(4,\)"):
        table.without_groups(np.zeros(3, dtype=bool))


def test_switching_digest_is_of_what_is_switched(table, tmp_path):
    digest = table.switching_digest()
    table.save(tmp_path / "table.safetensors")
    assert load_table(tmp_path / "table.safetensors").switching_digest() == digest
    for name in TENSORS:
        values = getattr(table, name).copy()
        values[-1] += 1
        other = replace(table, **{name: values})
        switched = name == "word_boundary" or name.startswith(("key_", "candidate_")) and name != "key_group"
        assert (other.switching_digest() != digest) == switched, name
    assert replace(table, languages=("en", "fr")).switching_digest() != digest
    assert table.with_keys(np.arange(0)).switching_digest() != digest


def test_row_indices():
    values = np.arange(10)
    index, offsets = row_indices(np.array([0, 3, 3, 7, 10]), np.array([2, 1, 0, 2]))
    assert values[index].tolist() == [3, 4, 5, 6, 0, 1, 2, 3, 4, 5, 6]
    assert offsets.tolist() == [0, 4, 4, 7, 11]
