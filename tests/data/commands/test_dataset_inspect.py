"""`dataset inspect`: exact lengths, sampled tokens, decoded text, JSON."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dataset_parts import EOD, VOCAB_SIZE, make_dataset, random_documents, write_tokens
from support.messages import assert_facts, user_error

from megatron_prealign import cli
from megatron_prealign.corpus.read_errors import Problem
from megatron_prealign.data.commands import inspect as inspect_module
from megatron_prealign.data.commands.inspect import inspect_dataset, measure_lengths
from megatron_prealign.data.indexed import import_indexed_dataset, load_index, write_index
from megatron_prealign.data.sidecar import InputRecord, TokenizerRecord
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

TEXTS = ["The first document, about apples.\n", "Second: 苹果 and pears", "x" * 5000]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    train_tokenizer([str(directory / "text.jsonl")], str(directory / "tok"), 300, show_progress=False)
    return str(directory / "tok")


def make_text(prefix: Path, tokenizer: str, /, **fields: object) -> str:
    opened = load_tokenizer(tokenizer)
    record = TokenizerRecord(str(opened.path), opened.fingerprint, opened.vocab_size)
    documents = [[*opened.encode(text), opened.eod_id] for text in TEXTS]
    return make_dataset(prefix, documents, **({"tokenizer": record, "eod_id": opened.eod_id} | fields))


@settings(max_examples=80)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 5000), st.integers(0, 2**31 - 1)), min_size=1, max_size=60),
    chunk=st.integers(1, 9),
)
def test_lengths_against_sorting(tmp_path_factory, lengths, chunk):
    path = tmp_path_factory.mktemp("index") / "a.idx"
    write_index(path, np.uint16, np.array(lengths, dtype=np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspect_module, "_CHUNK", chunk)
        measured = measure_lengths(load_index(path))
    ordered = sorted(lengths)
    assert (measured.min, measured.max, measured.mean) == (ordered[0], ordered[-1], sum(ordered) / len(ordered))
    for fraction, value in ((0.5, measured.median), (0.9, measured.p90), (0.99, measured.p99)):
        exact = ordered[max(int(np.ceil(fraction * len(ordered))), 1) - 1]
        assert value == exact if exact < 2048 else exact * 0.999 <= value <= exact
    assert measured.histogram[0][0] <= ordered[0] <= measured.histogram[0][1]
    for low, high, count in measured.histogram:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for _, _, count in measured.histogram) == len(lengths)


def test_documents_of_several_sequences(tmp_path):
    builder = import_indexed_dataset().IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    for lengths in ([4, 0, 5], [], [0], [7]):
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "a.idx"))
    found = inspect_dataset(str(tmp_path / "a"), samples=9)
    assert (found.documents, found.sequences, found.tokens, found.sidecar) == (4, 5, 16, None)
    assert found.lengths is not None
    assert (found.lengths.min, found.lengths.median, found.lengths.max) == (0, 0, 9)
    assert [(sample.document, sample.tokens) for sample in found.samples] == [(0, 9), (1, 0), (2, 0), (3, 7)]
    assert found.samples[3].ids == list(range(7))


def test_text(tmp_path, tokenizer, capsys):
    prefix = make_text(
        tmp_path / "en",
        tokenizer,
        inputs=[InputRecord(f"{number}.jsonl", 1000) for number in range(7)],
        skipped=[Problem("0.jsonl:3", "empty document")],
        skipped_count=1,
        shard="1/1",
    )
    assert cli.main(["dataset", "inspect", "--input", prefix]) == 0
    printed = capsys.readouterr().out
    for part in [
        "documents     3\n",
        "as uint16,",
        "language      zh\n",
        f"tokenizer     {tokenizer}, ",
        "inputs        7, 7,000 bytes\n  0.jsonl\n",
        "  ... 2 more\n",
        "skipped       1\n  0.jsonl:3: empty document\n",
        "checksums     bin, idx\n",
        "shard         1/1\n",
        "'The first document, about apples.\\n'",
        "'Second: 苹果 and pears",
        "################",
    ]:
        assert part in printed, part
    assert cli.main(["dataset", "inspect", "--input", prefix, "--json", "--samples", "1"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert [sample["document"] for sample in summary["samples"]] == [0]
    assert summary["sidecar"]["language"] == "zh"
    assert summary["lengths"]["max"] == max(len(load_tokenizer(tokenizer).encode(text)) + 1 for text in TEXTS)


def test_a_tokenizer_that_does_not_match(tmp_path, tokenizer):
    prefix = make_dataset(tmp_path / "a", random_documents(5, seed=1))
    found = inspect_dataset(prefix)
    assert_facts(found.note or "", "no/such/tokenizer", "--tokenizer")
    assert found.samples[0].text is None and found.samples[0].ids[-1] in (EOD, *range(EOD, VOCAB_SIZE))
    with user_error(f"--tokenizer {tokenizer} does not match {prefix}", "no/such/tokenizer"):
        inspect_dataset(prefix, tokenizer=tokenizer)
    with user_error(f"{tmp_path / 'none'}: tokenizer not found"):
        inspect_dataset(prefix, tokenizer=str(tmp_path / "none"))
    changed = make_text(tmp_path / "b", tokenizer)
    opened = load_tokenizer(tokenizer)
    record = TokenizerRecord(tokenizer, "sha256:older", opened.vocab_size)
    changed = make_text(tmp_path / "b", tokenizer, tokenizer=record)
    assert_facts(inspect_dataset(changed).note or "", tokenizer, "has changed", "--tokenizer")


def test_without_a_sidecar(tmp_path, tokenizer, capsys):
    write_tokens(tmp_path / "plain", [[1, 2], [3]])
    assert cli.main(["dataset", "inspect", "--input", str(tmp_path / "plain")]) == 0
    printed = capsys.readouterr().out
    assert_facts(printed, "sidecar       none", "note: plain.json is missing", "--tokenizer")
    assert inspect_dataset(str(tmp_path / "plain"), tokenizer=tokenizer).samples[0].text is not None


def test_tokens_are_counted_all_or_sampled(tmp_path):
    documents = [[5] * 300, [6] * 200, [7] * 100, [EOD], [VOCAB_SIZE + 3]]
    prefix = make_dataset(tmp_path / "a", documents)
    counts = inspect_dataset(prefix).counts
    assert counts.frequent == [(5, 300, None), (6, 200, None), (7, 100, None), (EOD, 1, None), (1003, 1, None)]
    assert (counts.tokens, counts.distinct, counts.outside) == (602, 5, 1)
    sampled = inspect_dataset(prefix, count_tokens=128).counts
    assert sampled.tokens == 128
    assert [token for token, _, _ in sampled.frequent[:3]] == [5, 6, 7]
    assert abs(sampled.frequent[0][1] - 64) <= 2


def test_an_empty_dataset(tmp_path, capsys):
    prefix = make_dataset(tmp_path / "a", [], shard="2/2")
    assert cli.main(["dataset", "inspect", "--input", prefix]) == 0
    assert "documents     0\n" in capsys.readouterr().out
    assert cli.main(["dataset", "inspect", "--input", prefix, "--samples", "-1"]) == 2
