"""Fuzzing: arbitrary bytes in a dictionary or table are either read or raise a one-line user error."""

import gzip
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.dictionary_files import add_entries, read

from megatron_prealign.dictionary.build import BuildSettings, build_table
from megatron_prealign.dictionary.build_report import BuildReport
from megatron_prealign.dictionary.coverage import match_words, split_words
from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.table import TENSORS, DictionaryTable, load_table
from megatron_prealign.errors import UserError

FUZZ = settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# Fragments that are valid in some format, so that random files pass the first check.
PIECES = [
    *(b"\t", b"\n", b"\r\n", b" ", b"\0", b"$", b",", b";", b'"', b"/", b"[", b"]", b"#!", b"\xef\xbb\xbf", b"\xff"),
    *(b"apple", "Äpfel".encode(), "银行 银行 [yin2] /bank/".encode(), b"\xed\xa0\x80", b"-1", b"1e999", b"0"),
    *(b'{"src_text": "a", "tgt_text": "b"}', b'{"words": "a $ b"}', b'{"word": "a", "lang_code": "en", "senses": []}'),
    *(b"id,langvar,txt", b"id,meaning,expr", b"id,lang_code,var_code", b"1,eng,0", b"2,deu,0", b"1,1,1"),
    *(b"StarDict's dict ifo file", b"version=3.0.0", b"wordcount=1", b"idxfilesize=14", b"sametypesequence=m"),
    *(b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"BZh9", b"\\ud800", b"QQ==", b"A\tB", b"\x0b", b"\x85"),
]
BYTES = st.one_of(st.binary(max_size=200), st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join))
LINES = st.lists(st.sampled_from(PIECES), max_size=40).map(b"\n".join)
DATA = st.one_of(BYTES, LINES, BYTES.map(gzip.compress))


def check(path: Path, languages: str = "en-de", **options) -> None:
    for on_error in ("stop", "skip"):
        try:
            pairs, _, _ = read(path, languages, on_error=on_error, **options)
        except UserError as error:
            assert "\n" not in str(error) and str(path.parent) in str(error)
        else:
            assert all(isinstance(word, str) for pair in pairs for word in pair[:2])


@pytest.mark.parametrize(
    "format", ["auto", "pairs", "words", "tsv", "csv", "space", "cedict", "wiktextract", "wiktextract-glosses"]
)
@FUZZ
@given(data=DATA, weights=st.booleans())
def test_one_file(tmp_path, format, data, weights):
    (tmp_path / "file").write_bytes(data)
    check(tmp_path / "file", format=format, weights=weights)


@FUZZ
@given(index=DATA, articles=DATA)
def test_dictd(tmp_path, index, articles):
    (tmp_path / "d.index").write_bytes(index)
    (tmp_path / "d.dict.dz").write_bytes(articles)
    check(tmp_path / "d.index")


@FUZZ
@given(
    places=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=5),
    articles=BYTES,
)
def test_dictd_places(tmp_path, places, articles):
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    rows = [f"apple\t{digits[begin]}\t{digits[size]}\n" for begin, size in places]
    (tmp_path / "d.index").write_text("".join(rows))
    (tmp_path / "d.dict").write_bytes(articles)
    check(tmp_path / "d.index")


@FUZZ
@given(ifo=DATA, idx=DATA, syn=DATA, articles=DATA)
def test_stardict(tmp_path, ifo, idx, syn, articles):
    for ending, data in ((".ifo", ifo), (".idx", idx), (".syn", syn), (".dict", articles)):
        (tmp_path / f"s{ending}").write_bytes(data)
    check(tmp_path / "s.ifo")


@FUZZ
@given(
    rows=st.lists(st.tuples(BYTES, st.integers(0, 2**32 - 1) | st.integers(0, 30), st.integers(0, 30)), max_size=4),
    articles=BYTES,
    types=st.text("mhwtgxWPX?é", max_size=3),
    synonyms=st.lists(st.tuples(BYTES, st.integers(0, 5)), max_size=3),
)
def test_stardict_with_a_matching_index(tmp_path, rows, articles, types, synonyms):
    idx = b"".join(word + b"\0" + struct.pack(">II", begin, size) for word, begin, size in rows)
    syn = b"".join(word + b"\0" + struct.pack(">I", number) for word, number in synonyms)
    header = f"version=2.4.2\nwordcount={len(rows)}\nidxfilesize={len(idx)}\nsynwordcount={len(synonyms)}\n"
    (tmp_path / "s.ifo").write_text(f"StarDict's dict ifo file\n{header}sametypesequence={types}\n", encoding="utf-8")
    for ending, data in ((".idx", idx), (".syn", syn), (".dict", articles)):
        (tmp_path / f"s{ending}").write_bytes(data)
    check(tmp_path / "s.ifo")


@FUZZ
@given(langvar=DATA, expr=DATA, denotation=DATA, good=st.integers(0, 3))
def test_panlex(tmp_path, langvar, expr, denotation, good):
    # Some of the files are valid, so that the others are read.
    langvar = b"id,lang_code,var_code\n1,eng,0\n2,deu,0\n" if good > 0 else langvar
    expr = b"id,langvar,txt\n1,1,apple\n2,2,Apfel\n" + expr if good > 1 else expr
    denotation = b"id,meaning,expr\n1,1,1\n2,1,2\n" + denotation if good > 2 else denotation
    for name, data in (("langvar", langvar), ("expr", expr), ("denotation", denotation)):
        (tmp_path / f"{name}.csv").write_bytes(data)
    check(tmp_path)


# Tables


@pytest.fixture(scope="module")
def table(tokenizer) -> DictionaryTable:
    builder = GroupBuilder()
    add_entries(builder, [["apple", "Apfel"], ["house", "Haus"], ["house", "Gebäude"]], ("en", "de"), [1.0, 2.0, 1.0])
    return build_table(builder.build(), tokenizer, BuildSettings(), BuildReport())


def check_table(path: Path) -> None:
    try:
        table = load_table(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return
    # A table that loads must be usable.
    for group in range(table.num_groups):
        table.group_words(group)
    table.held_out_groups(0.5)
    assert table.switching_fingerprint()
    match_words(table, 0, table.key_tokens, split_words(table.key_tokens, table.key_offsets[:-1], table.word_boundary))


@FUZZ
@given(data=DATA)
def test_table_of_any_bytes(tmp_path, data):
    (tmp_path / "t").write_bytes(data)
    check_table(tmp_path / "t")


@FUZZ
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    cut=st.floats(0, 1),
)
def test_table_with_bytes_changed(tmp_path, table, changes, cut):
    table.save(tmp_path / "t")
    data = bytearray((tmp_path / "t").read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    (tmp_path / "t").write_bytes(data[: int(cut * len(data))] if cut < 0.5 else data)
    check_table(tmp_path / "t")


VALUES = st.sampled_from([0, 1, -1, 2, 7, 100, 255, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63)])


@FUZZ
@given(
    name=st.sampled_from([*TENSORS, "word_weight"]),
    places=st.lists(st.tuples(st.integers(0, 10**6), VALUES), max_size=3),
    length=st.sampled_from([None, None, None, -1, 0, 1]),
    dtype=st.sampled_from([None, None, None, "float32", "int64", "bool"]),
)
def test_table_with_values_changed(tmp_path, table, name, places, length, dtype):
    values = getattr(table, name).copy()
    for place, value in places:
        values[place % len(values)] = np.array(value).astype(values.dtype)
    values = values[:length] if length is not None else values
    changed = replace(table, **{name: values.astype(dtype or values.dtype)})
    changed.save(tmp_path / "t")
    check_table(tmp_path / "t")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@FUZZ
@given(
    key=st.sampled_from(["languages", "sources", "build", "vocab_size", "tokenizer_fingerprint", "format_version"]),
    value=JSON.map(json.dumps) | st.text(max_size=5),
)
def test_table_with_metadata_changed(tmp_path, table, key, value):
    from safetensors import safe_open
    from safetensors.numpy import save_file

    table.save(tmp_path / "whole")
    with safe_open(tmp_path / "whole", framework="numpy") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "t", metadata | {key: value})
    check_table(tmp_path / "t")
