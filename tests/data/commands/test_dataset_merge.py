"""`dataset merge`: the bytes of Megatron-Core's own merge, shards in order, and parts that do not fit together."""

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
from support.sidecars import save_sidecar

from megatron_prealign import cli
from megatron_prealign.corpus.read_errors import Problem
from megatron_prealign.data.commands import merge as merge_module
from megatron_prealign.data.commands.merge import merge
from megatron_prealign.data.indexed import import_indexed_dataset, open_indexed
from megatron_prealign.data.sidecar import InputRecord, TokenizerRecord, load_sidecar
from megatron_prealign.data.word_bitmap import BitmapWriter
from megatron_prealign.errors import UserError
from megatron_prealign.files.checksum import file_checksum
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess


def reference(directory: Path, prefixes: list[str], dtype: type = np.uint16) -> tuple[bytes, bytes]:
    """The `.bin` and `.idx` that Megatron-Core's builder joins."""
    builder = import_indexed_dataset().IndexedDatasetBuilder(str(directory / "reference.bin"), dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        # After each part it collects garbage, a quarter of a second, which changes nothing.
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
    monkeypatch.setattr(merge_module, "_PIECE_BYTES", 100)
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
    facts = load_sidecar(out)
    assert facts == result.sidecar
    assert (facts.documents, facts.tokens, facts.bytes) == (48, sum(map(len, documents)), 5 * 48)
    assert facts.inputs == [InputRecord(f"part{number}.jsonl", 100) for number in range(3)]
    assert facts.checksums == {name: file_checksum(Path(f"{out}.{name}")) for name in ("bin", "idx", "words")}
    assert (facts.segmenter, facts.engine, facts.text_keys, facts.shard) == ("jieba", "tokenizers", ["text"], None)


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


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(st.tuples(st.lists(st.booleans(), max_size=40), st.booleans()), max_size=8), stray=st.booleans())
def test_bits_that_do_not_end_on_bytes(tmp_path_factory, parts, stray):
    path = tmp_path_factory.mktemp("bits") / "words"
    writer = BitmapWriter(path)
    for bits, packed in parts:
        array = np.array(bits, dtype=np.bool_)
        if not packed:
            writer.append(array)
            continue
        whole = np.packbits(array, bitorder="little")
        if stray and len(bits) % 8:
            whole[-1] |= 0xFF << len(bits) % 8 & 0xFF
        writer.append_packed(whole, len(bits))
    writer.close()
    every = np.array([bit for bits, _ in parts for bit in bits], dtype=np.bool_)
    assert path.read_bytes() == np.packbits(every, bitorder="little").tobytes()


def shards(directory: Path, count: int, **facts: object) -> list[str]:
    """A run in shards, the last one without a document."""
    inputs = [InputRecord("a.jsonl", 7), InputRecord("b.jsonl", 8)]
    return [
        make_dataset(
            directory / f"shard{number}",
            random_documents(5, seed=number) if number < count else [],
            shard=f"{number}/{count}",
            inputs=inputs,
            skipped=[Problem(f"a.jsonl:{number}", "empty document")] * 60,
            skipped_count=60,
            **facts,
        )
        for number in range(1, count + 1)
    ]


def test_shards_are_put_in_order(tmp_path):
    prefixes = shards(tmp_path, 11)
    result = merge(prefixes[::-1], str(tmp_path / "all"), show_progress=False)
    assert result.parts == prefixes
    assert ((tmp_path / "all.bin").read_bytes(), (tmp_path / "all.idx").read_bytes()) == reference(tmp_path, prefixes)
    facts = load_sidecar(tmp_path / "all")
    assert facts.inputs == [InputRecord("a.jsonl", 7), InputRecord("b.jsonl", 8)]
    assert (facts.shard, facts.skipped_count, len(facts.skipped)) == (None, 660, 100)


@pytest.mark.parametrize("segmenter", [None, "support.word_cutters:KnownWords"])
def test_shards_of_a_real_run(tmp_path, tiny, segmenter):
    """They give what the run without --shard gives, byte for byte, also where a shard is empty."""
    (tmp_path / "more.txt").write_text("苹果和梨 are fruit.\n\nA second document.\n")
    inputs = [str(tiny.directory / "corpus.jsonl"), str(tmp_path / "more.txt")]
    settings = PreprocessSettings(language="en", segmenter=segmenter)
    preprocess(inputs, tiny.tokenizer, tmp_path / "whole", settings, show_progress=False)
    count = 70
    for number in range(1, count + 1):
        one = replace(settings, shard=(number, count))
        preprocess(inputs, tiny.tokenizer, tmp_path / "part", one, show_progress=False)
    prefixes = [str(tmp_path / f"part_{number:05d}-of-{count:05d}") for number in range(count, 0, -1)]
    assert any(load_sidecar(prefix).documents == 0 for prefix in prefixes)
    merge(prefixes, str(tmp_path / "merged"), workers=2, show_progress=False)
    for ending in ("bin", "idx", *(["words"] if segmenter else [])):
        assert (tmp_path / f"merged.{ending}").read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    assert load_sidecar(tmp_path / "merged") == load_sidecar(tmp_path / "whole")


def test_shards_that_are_not_whole(tmp_path, capsys):
    prefixes = shards(tmp_path, 5)
    other = make_dataset(tmp_path / "other", random_documents(3, seed=9))
    ten = make_dataset(tmp_path / "ten", random_documents(3, seed=9), shard="2/10")
    bad = make_dataset(tmp_path / "bad", random_documents(3, seed=9), shard="6/5")
    again = make_dataset(tmp_path / "again", random_documents(3, seed=9), shard="2/5")
    new = [InputRecord("new.jsonl", 101)]
    elsewhere = make_dataset(tmp_path / "elsewhere", random_documents(3, seed=9), shard="5/5", inputs=new)
    for given_parts, message in [
        (
            [*prefixes[:4], elsewhere],
            f"{elsewhere} is a shard of 1 inputs of 101 bytes, {prefixes[0]} of 2 of 15; merge the shards of one run",
        ),
        ([prefixes[1], prefixes[3]], "of 5 shards 3 are missing: 1, 3, 5; preprocess them (--shard i/5)"),
        ([*prefixes, other], f"{other} is no shard, others are of 5 shards"),
        ([other, *prefixes], f"{other} is no shard, others are of 5 shards"),
        ([*prefixes, ten], f"{ten} is shard 2 of 10, others are of 5 shards"),
        ([*prefixes, again], f"{again} and {prefixes[1]} are both shard 2 of 5"),
        ([*prefixes[:4], bad], "bad.json: shard is '6/5', expected like 3/8"),
    ]:
        status = cli.main(["dataset", "merge", "--input", *given_parts, "--output", str(tmp_path / "out" / "all")])
        error = capsys.readouterr().err
        assert status == 2 and len(error.splitlines()) == 1
        assert message in error
    assert not (tmp_path / "out").exists()
    some = ["--input", prefixes[3], prefixes[1], "--output", str(tmp_path / "out" / "all")]
    assert cli.main(["dataset", "merge", *some, "--allow-missing"]) == 0
    assert f"parts      2: {prefixes[1]}, {prefixes[3]}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language": "ja"}, "b.json: language is ja, in .*a.json zh; .*give --language"),
        ({"tokenizer": TokenizerRecord("x", "sha256:bb", VOCAB_SIZE)}, "tokenizer.fingerprint is sha256:bb, in"),
        ({"eod_id": 4}, "eod_id is 4, in .* 3; preprocess all with one tokenizer"),
        ({"append_eod": False}, "append_eod is False, in"),
        ({"bos": True}, "bos is True, in"),
        ({"segmenter": None}, "segmenter is None, in .* jieba; .*--drop-words"),
        ({"documents": 4}, "b.idx: holds 3 documents and .* its sidecar says 4 and"),
        ({"tokenizer": TokenizerRecord("x", "sha256:aa", 65_537)}, "has 65,537 ids, but b.idx stores them as uint16"),
        ({"checksums": {"bin": "xxh3:0"}}, "b.bin: its checksum is xxh3:.*, expected xxh3:0"),
        ({"checksums": {"idx": "xxh3:0"}}, "b.idx: its checksum is xxh3:.*, expected xxh3:0"),
        ({"checksums": {"words": "xxh3:0"}}, "b.words: its checksum is xxh3:.*, expected xxh3:0"),
    ],
)
def test_parts_that_do_not_fit(tmp_path, change, message):
    make_dataset(tmp_path / "a", random_documents(3, seed=1), segmenter="jieba")
    make_dataset(tmp_path / "b", random_documents(3, seed=2), segmenter="jieba")
    save_sidecar(replace(load_sidecar(tmp_path / "b"), **change), tmp_path / "b")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=message):
        merge([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "out" / "all"), show_progress=False)
    assert names(tmp_path / "out") == []


def test_a_language_and_no_words_if_told(tmp_path, capsys):
    a = make_dataset(tmp_path / "a", random_documents(3, seed=1), segmenter="jieba")
    b = make_dataset(tmp_path / "b", random_documents(3, seed=2), language="ja", engine="gigatoken", text_keys=["body"])
    out = str(tmp_path / "all")
    (tmp_path / "all.words").write_bytes(b"of an older dataset")
    assert (
        cli.main(["dataset", "merge", "--input", a, f"{b}.bin", "--output", out, "--drop-words", "--language", "mul"])
        == 0
    )
    assert f"wrote {out}.bin, .idx and .json\nparts      2: {a}, {b}\ndocuments  6\n" in capsys.readouterr().out
    facts = load_sidecar(out)
    assert (facts.language, facts.segmenter, facts.engine) == ("mul", None, "tokenizers; gigatoken")
    assert facts.text_keys == ["text", "body"]
    assert not (tmp_path / "all.words").exists()


def test_other_types_of_tokens(tmp_path):
    a = make_dataset(tmp_path / "a", random_documents(3, seed=1))
    b = make_dataset(tmp_path / "b", random_documents(3, seed=2), dtype=np.int32)
    with pytest.raises(UserError, match=r"b\.idx: tokens are stored as int32, those of .*a as uint16"):
        merge([a, b], str(tmp_path / "all"), show_progress=False)


def test_inputs_and_outputs_that_cannot_be(tmp_path, capsys):
    a = make_dataset(tmp_path / "a", random_documents(3, seed=1))
    b = make_dataset(tmp_path / "b", random_documents(3, seed=2))
    for ending in ("bin", "idx", "json"):
        os.symlink(f"{a}.{ending}", tmp_path / f"link.{ending}")
        os.symlink(tmp_path / f"loop.{ending}", tmp_path / f"loop.{ending}")
    write_tokens(tmp_path / "plain", random_documents(2, seed=3))
    (tmp_path / "file").write_text("in the way")
    before = names(tmp_path)
    plain = str(tmp_path / "plain")
    for arguments, message in [
        (["--input", a, a, "--output", "all"], f"--input {a} is given twice"),
        (["--input", a, str(tmp_path / "link"), "--output", "all"], "is given twice"),
        (["--input", a, b, "--output", str(tmp_path / "link")], "is also an input"),
        (["--input", a, b, "--output", f"{tmp_path}/x/../b"], "is also an input"),
        (["--input", a, str(tmp_path / "loop"), "--output", "all"], "a link that leads to no file"),
        (["--input", a, str(tmp_path / "none"), "--output", "all"], "none.idx: no such file"),
        (["--input", f"{a}.idx", "--output", "all"], "give the prefix without the ending"),
        (["--input", a, plain, "--output", "all"], "plain.json: no such file"),
        (["--input", "--output", "all"], "--input is empty"),
        (["--input", a, b, "--output", str(tmp_path)], "is a directory"),
        (["--input", a, b, "--output", "all.bin"], "expected a path without ending"),
        (["--input", a, b, "--output", str(tmp_path / "file" / "all")], f"{tmp_path}/file is a file"),
        (["--input", a, b, "--output", "all", "--workers", "0"], "workers is 0"),
        (["--input", plain, "--output", "all", "--without-sidecar", "--drop-words"], "joins tokens alone"),
        (["--input", plain, "--output", b, "--without-sidecar"], "b.json: is there and would be of other tokens"),
    ]:
        status = cli.main(["dataset", "merge", *arguments])
        error = capsys.readouterr().err
        assert status == 2, arguments
        assert message in error and len(error.splitlines()) == 1, error
    assert names(tmp_path) == before


def test_a_full_disk(tmp_path, monkeypatch):
    a = make_dataset(tmp_path / "a", random_documents(30, seed=1))
    (tmp_path / "out").mkdir()
    usage = merge_module.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(merge_module.shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(UserError, match=r"bytes are needed, 100 are free on its disk"):
        merge([a], str(tmp_path / "out" / "all"), show_progress=False)
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge_module.os, "pwrite", full)
    with pytest.raises(UserError, match="out/all: No space left on device; nothing was written"):
        merge([a], str(tmp_path / "out" / "all"), show_progress=False)
    assert names(tmp_path / "out") == []


def test_only_empty_parts(tmp_path):
    parts = [make_dataset(tmp_path / name, [], shard=f"{name}/2") for name in ("1", "2")]
    with pytest.raises(UserError, match="all 2 inputs are empty"):
        merge(parts, str(tmp_path / "all"), show_progress=False)


def test_a_merge_is_what_the_merge_of_merges_is(tmp_path):
    prefixes = [
        make_dataset(tmp_path / f"p{number}", random_documents(4, seed=number), segmenter="jieba")
        for number in range(3)
    ]
    whole, first, second = (str(tmp_path / name) for name in ("whole", "first", "second"))
    merge(prefixes, whole, show_progress=False)
    merge(prefixes[:2], first, show_progress=False)
    merge([first, prefixes[2]], second, show_progress=False)
    for ending in ("bin", "idx", "words"):
        assert Path(f"{second}.{ending}").read_bytes() == Path(f"{whole}.{ending}").read_bytes()
    assert json.loads(Path(f"{second}.json").read_text()) == json.loads(Path(f"{whole}.json").read_text())
