"""`dataset merge`: byte-identical to Megatron-Core's own merge, sorted shards, and incompatible parts."""

import gc
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dataset_parts import VOCAB_SIZE, make_dataset, random_documents, word_bits, write_tokens
from support.marks import slow_except
from support.messages import assert_refused, user_error
from support.sidecars import save_sidecar

from megatron_prealign import cli
from megatron_prealign.corpus.read_errors import Problem
from megatron_prealign.data.commands import merge as merge_module
from megatron_prealign.data.commands.merge import merge
from megatron_prealign.data.indexed import import_indexed_dataset, open_indexed
from megatron_prealign.data.sidecar import InputRecord, TokenizerRecord, load_sidecar
from megatron_prealign.data.word_bitmap import BitmapWriter
from megatron_prealign.files.checksum import file_checksum
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess


def reference(directory: Path, prefixes: list[str], dtype: type = np.uint16) -> tuple[bytes, bytes]:
    """`.bin` and `.idx` merged by Megatron-Core's builder."""
    builder = import_indexed_dataset().IndexedDatasetBuilder(str(directory / "reference.bin"), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        # It collects garbage after each part, which takes a quarter of a second and does not affect the result.
        patch.setattr(gc, "collect", lambda: 0)
        for prefix in prefixes:
            builder.add_index(prefix)
    builder.finalize(str(directory / "reference.idx"))
    return (directory / "reference.bin").read_bytes(), (directory / "reference.idx").read_bytes()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_bytes_of_megatron_cores_merge(tmp_path, monkeypatch, workers, dtype):
    monkeypatch.setattr(merge_module, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(merge_module, "_WORDS_BYTES", 3)
    counts = [17, 1, 30]
    parts = [random_documents(count, seed=number) for number, count in enumerate(counts)]
    prefixes = [
        make_dataset(tmp_path / f"part{number}", part, segmenter="jieba", dtype=dtype)
        for number, part in enumerate(parts)
    ]
    result = merge(prefixes, str(tmp_path / "out" / "all"), workers=workers, show_progress=False)
    tokens, index = reference(tmp_path, prefixes, dtype)
    out = tmp_path / "out" / "all"
    assert Path(f"{out}.bin").read_bytes() == tokens
    assert Path(f"{out}.idx").read_bytes() == index
    documents = [document for part in parts for document in part]
    assert Path(f"{out}.words").read_bytes() == np.packbits(word_bits(documents), bitorder="little").tobytes()
    assert names(tmp_path / "out") == ["all.bin", "all.idx", "all.json", "all.words"]
    sidecar = load_sidecar(out)
    assert sidecar == result.sidecar
    assert (sidecar.documents, sidecar.tokens, sidecar.bytes) == (48, sum(map(len, documents)), 5 * 48)
    assert sidecar.inputs == [InputRecord(f"part{number}.jsonl", 100) for number in range(3)]
    assert sidecar.checksums == {name: file_checksum(Path(f"{out}.{name}")) for name in ("bin", "idx", "words")}
    assert (sidecar.segmenter, sidecar.engine, sidecar.text_keys, sidecar.shard) == (
        "jieba",
        "tokenizers",
        ["text"],
        None,
    )


def test_documents_of_several_sequences(tmp_path):
    """Documents split into sentences, as Megatron-LM's tools can make them."""
    for name in ("a", "b"):
        builder = import_indexed_dataset().IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=np.int32)
        builder.add_document(np.arange(9), [4, 0, 5])
        builder.add_document(np.arange(2), [2])
        builder.finalize(str(tmp_path / f"{name}.idx"))
    prefixes = [str(tmp_path / name) for name in ("a", "b")]
    result = merge(prefixes, str(tmp_path / "all"), without_sidecar=True, show_progress=False)
    assert ((tmp_path / "all.bin").read_bytes(), (tmp_path / "all.idx").read_bytes()) == reference(
        tmp_path, prefixes, np.int32
    )
    assert open_indexed(tmp_path / "all").document_indices.tolist() == [0, 3, 4, 7, 8]
    assert (result.sidecar, result.documents) == (None, 4)
    assert not (tmp_path / "all.json").exists()


@settings(max_examples=150)
@given(parts=st.lists(st.tuples(st.lists(st.booleans(), max_size=40), st.booleans()), max_size=8), stray=st.booleans())
def test_bits_that_are_not_byte_aligned(tmp_path_factory, parts, stray):
    path = tmp_path_factory.mktemp("bits") / "words"
    writer = BitmapWriter(path)
    for bits, packed in parts:
        array = np.array(bits, dtype=np.bool_)
        if not packed:
            writer.append(array)
            continue
        content = np.packbits(array, bitorder="little")
        if stray and len(bits) % 8:
            content[-1] |= 0xFF << len(bits) % 8 & 0xFF
        writer.append_packed(content, len(bits))
    writer.close()
    expected = np.array([bit for bits, _ in parts for bit in bits], dtype=np.bool_)
    assert path.read_bytes() == np.packbits(expected, bitorder="little").tobytes()


def shards(directory: Path, count: int, **fields: object) -> list[str]:
    """The shards of a run; the last one is empty."""
    inputs = [InputRecord("a.jsonl", 7), InputRecord("b.jsonl", 8)]
    return [
        make_dataset(
            directory / f"shard{number}",
            random_documents(5, seed=number) if number < count else [],
            shard=f"{number}/{count}",
            inputs=inputs,
            skipped=[Problem(f"a.jsonl:{number}", "empty document")] * 60,
            skipped_count=60,
            **fields,
        )
        for number in range(1, count + 1)
    ]


def test_shards_are_sorted(tmp_path):
    prefixes = shards(tmp_path, 11)
    result = merge(prefixes[::-1], str(tmp_path / "all"), show_progress=False)
    assert result.parts == prefixes
    assert ((tmp_path / "all.bin").read_bytes(), (tmp_path / "all.idx").read_bytes()) == reference(tmp_path, prefixes)
    sidecar = load_sidecar(tmp_path / "all")
    assert sidecar.inputs == [InputRecord("a.jsonl", 7), InputRecord("b.jsonl", 8)]
    assert (sidecar.shard, sidecar.skipped_count, len(sidecar.skipped)) == (None, 660, 100)


@pytest.mark.parametrize("segmenter", slow_except([None, "support.word_cutters:KnownWords"], None))
def test_shards_of_a_real_run(tmp_path, tiny, segmenter):
    """Byte-identical to the run without --shard, including empty shards."""
    (tmp_path / "more.txt").write_text("苹果和梨 are fruit.\n\nA second document.\n")
    inputs = [str(tiny.directory / "corpus.jsonl"), str(tmp_path / "more.txt")]
    settings = PreprocessSettings(language="en", segmenter=segmenter)
    preprocess(inputs, tiny.tokenizer, tmp_path / "unsharded", settings, show_progress=False)
    count = 70
    for number in range(1, count + 1):
        one = replace(settings, shard=(number, count))
        preprocess(inputs, tiny.tokenizer, tmp_path / "part", one, show_progress=False)
    prefixes = [str(tmp_path / f"part_{number:05d}-of-{count:05d}") for number in range(count, 0, -1)]
    assert any(load_sidecar(prefix).documents == 0 for prefix in prefixes)
    merge(prefixes, str(tmp_path / "merged"), workers=2, show_progress=False)
    for ending in ("bin", "idx", *(["words"] if segmenter else [])):
        assert (tmp_path / f"merged.{ending}").read_bytes() == (tmp_path / f"unsharded.{ending}").read_bytes()
    assert load_sidecar(tmp_path / "merged") == load_sidecar(tmp_path / "unsharded")


def test_inconsistent_shards(tmp_path, capsys):
    prefixes = shards(tmp_path, 5)
    other = make_dataset(tmp_path / "other", random_documents(3, seed=9))
    ten = make_dataset(tmp_path / "ten", random_documents(3, seed=9), shard="2/10")
    bad = make_dataset(tmp_path / "bad", random_documents(3, seed=9), shard="6/5")
    again = make_dataset(tmp_path / "again", random_documents(3, seed=9), shard="2/5")
    new = [InputRecord("new.jsonl", 101)]
    elsewhere = make_dataset(tmp_path / "elsewhere", random_documents(3, seed=9), shard="5/5", inputs=new)
    for inputs, facts in [
        ([*prefixes[:4], elsewhere], (elsewhere, "1 inputs of 101 bytes", prefixes[0], "2 inputs of 15 bytes")),
        ([prefixes[1], prefixes[3]], ("3 of 5 shards are missing: 1, 3, 5;", "--shard i/5", "--allow-missing")),
        ([*prefixes, other], (f"{other} is not a shard", "shards of 5")),
        ([other, *prefixes], (f"{other} is not a shard", "shards of 5")),
        ([*prefixes, ten], (f"{ten} is shard 2 of 10", "shards of 5")),
        ([*prefixes, again], (f"{again} and {prefixes[1]} are both shard 2 of 5",)),
        ([*prefixes[:4], bad], ("bad.json: shard is '6/5'", "3/8")),
    ]:
        status = cli.main(["dataset", "merge", "--input", *inputs, "--output", str(tmp_path / "out" / "all")])
        assert_refused(status, capsys.readouterr().err, *facts)
    assert not (tmp_path / "out").exists()
    some = ["--input", prefixes[3], prefixes[1], "--output", str(tmp_path / "out" / "all")]
    assert cli.main(["dataset", "merge", *some, "--allow-missing"]) == 0
    assert f"inputs     2: {prefixes[1]}, {prefixes[3]}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"language": "ja"}, ("b.json: language is ja", "expected zh", "a.json", "--language")),
        (
            {"tokenizer": TokenizerRecord("x", "sha256:bb", VOCAB_SIZE)},
            ("b.json: tokenizer.fingerprint is sha256:bb", "expected sha256:aa", "a.json"),
        ),
        ({"eod_id": 4}, ("b.json: eod_id is 4", "expected 3", "a.json", "tokenizer")),
        ({"append_eod": False}, ("b.json: append_eod is False", "expected True", "a.json")),
        ({"bos": True}, ("b.json: bos is True", "expected False", "a.json")),
        ({"segmenter": None}, ("b.json: segmenter is None", "expected jieba", "a.json", "--drop-words")),
        ({"documents": 4}, ("b.idx: contains 3 documents", "sidecar lists 4")),
        ({"tokenizer": TokenizerRecord("x", "sha256:aa", 65_537)}, ("b.json", "65,537 ids", "b.idx", "uint16")),
        ({"checksums": {"bin": "xxh3:0"}}, ("b.bin: checksum is xxh3:", "expected xxh3:0")),
        ({"checksums": {"idx": "xxh3:0"}}, ("b.idx: checksum is xxh3:", "expected xxh3:0")),
        ({"checksums": {"words": "xxh3:0"}}, ("b.words: checksum is xxh3:", "expected xxh3:0")),
    ],
)
def test_incompatible_parts(tmp_path, change, facts):
    make_dataset(tmp_path / "a", random_documents(3, seed=1), segmenter="jieba")
    make_dataset(tmp_path / "b", random_documents(3, seed=2), segmenter="jieba")
    save_sidecar(replace(load_sidecar(tmp_path / "b"), **change), tmp_path / "b")
    (tmp_path / "out").mkdir()
    with user_error(*facts):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out" / "all"), show_progress=False)
    assert names(tmp_path / "out") == []


def test_language_and_drop_words_options(tmp_path, capsys):
    a = make_dataset(tmp_path / "a", random_documents(3, seed=1), segmenter="jieba")
    b = make_dataset(tmp_path / "b", random_documents(3, seed=2), language="ja", engine="gigatoken", text_keys=["body"])
    out = str(tmp_path / "all")
    (tmp_path / "all.words").write_bytes(b"of an older dataset")
    assert (
        cli.main(["dataset", "merge", "--input", a, f"{b}.bin", "--output", out, "--drop-words", "--language", "mul"])
        == 0
    )
    assert f"wrote {out}.bin, .idx and .json\ninputs     2: {a}, {b}\ndocuments  6\n" in capsys.readouterr().out
    sidecar = load_sidecar(out)
    assert (sidecar.language, sidecar.segmenter, sidecar.engine) == ("mul", None, "tokenizers; gigatoken")
    assert sidecar.text_keys == ["text", "body"]
    assert not (tmp_path / "all.words").exists()


def test_different_token_dtypes(tmp_path):
    a = make_dataset(tmp_path / "a", random_documents(3, seed=1))
    b = make_dataset(tmp_path / "b", random_documents(3, seed=2), dtype=np.int32)
    with user_error(f"{b}.idx", "int32", "expected uint16", a):
        merge([a, b], str(tmp_path / "all"), show_progress=False)


def test_invalid_inputs_and_outputs(tmp_path, capsys):
    a = make_dataset(tmp_path / "a", random_documents(3, seed=1))
    b = make_dataset(tmp_path / "b", random_documents(3, seed=2))
    for ending in ("bin", "idx", "json"):
        os.symlink(f"{a}.{ending}", tmp_path / f"link.{ending}")
        os.symlink(tmp_path / f"loop.{ending}", tmp_path / f"loop.{ending}")
    write_tokens(tmp_path / "plain", random_documents(2, seed=3))
    (tmp_path / "file").write_text("in the way")
    before = names(tmp_path)
    plain = str(tmp_path / "plain")
    for arguments, *facts in [
        (["--input", a, a, "--output", "all"], f"--input {a} is listed twice"),
        (["--input", a, str(tmp_path / "link"), "--output", "all"], f"--input {tmp_path}/link is listed twice", a),
        (["--input", a, b, "--output", str(tmp_path / "link")], f"--output {tmp_path}/link is also an input"),
        (["--input", a, b, "--output", f"{tmp_path}/x/../b"], f"--output {tmp_path}/x/../b is also an input"),
        (["--input", a, str(tmp_path / "loop"), "--output", "all"], "loop.idx", "symbolic link"),
        (["--input", a, str(tmp_path / "none"), "--output", "all"], "none.idx: file not found"),
        (["--input", f"{a}.idx", "--output", "all"], f"{a}.idx.idx: file not found", "prefix"),
        (["--input", a, plain, "--output", "all"], "plain.json: file not found"),
        (["--input", "--output", "all"], "--input is empty"),
        (["--input", a, b, "--output", str(tmp_path)], f"output {tmp_path} is a directory"),
        (["--input", a, b, "--output", "all.bin"], "output all.bin", "without extension"),
        (["--input", a, b, "--output", str(tmp_path / "file" / "all")], f"{tmp_path}/file is a file"),
        (["--input", a, b, "--output", "all", "--workers", "0"], "workers is 0"),
        (
            ["--input", plain, "--output", "all", "--without-sidecar", "--drop-words"],
            "--without-sidecar",
            "--drop-words",
        ),
        (["--input", plain, "--output", b, "--without-sidecar"], "b.json already exists", "--output"),
    ]:
        status = cli.main(["dataset", "merge", *arguments])
        assert_refused(status, capsys.readouterr().err, *facts)
    assert names(tmp_path) == before


def test_a_full_disk(tmp_path, monkeypatch):
    a = make_dataset(tmp_path / "a", random_documents(30, seed=1))
    (tmp_path / "out").mkdir()
    usage = merge_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with user_error(tmp_path / "out" / "all", "100 free", "free disk space"):
        merge([a], str(tmp_path / "out" / "all"), show_progress=False)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module.os, "pwrite", full)
    with user_error("out/all: No space left on device", "nothing was written"):
        merge([a], str(tmp_path / "out" / "all"), show_progress=False)
    assert names(tmp_path / "out") == []


def test_only_empty_parts(tmp_path):
    parts = [make_dataset(tmp_path / name, [], shard=f"{name}/2") for name in ("1", "2")]
    with user_error("all 2 inputs are empty"):
        merge(parts, str(tmp_path / "all"), show_progress=False)


def test_merging_is_associative(tmp_path):
    prefixes = [
        make_dataset(tmp_path / f"p{number}", random_documents(4, seed=number), segmenter="jieba")
        for number in range(3)
    ]
    direct, first, second = (str(tmp_path / name) for name in ("direct", "first", "second"))
    merge(prefixes, direct, show_progress=False)
    merge(prefixes[:2], first, show_progress=False)
    merge([first, prefixes[2]], second, show_progress=False)
    for ending in ("bin", "idx", "words"):
        assert Path(f"{second}.{ending}").read_bytes() == Path(f"{direct}.{ending}").read_bytes()
    assert json.loads(Path(f"{second}.json").read_text()) == json.loads(Path(f"{direct}.json").read_text())
