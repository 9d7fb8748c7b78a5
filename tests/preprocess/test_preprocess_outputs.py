"""Output of preprocessing: the bytes of Megatron-LM's tool, datasets by key and language, shards, engines."""

import gzip
import json
import os
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import sentencepiece
import transformers
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from support.marks import slow_except
from support.messages import assert_facts, assert_refused, user_error

from megatron_prealign.cli import main
from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.corpus.readers import Fields
from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.preprocess import run as preprocess_module
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.tokenizer.gigatoken_engine import UnsuitableTextError
from megatron_prealign.tokenizer.load import load_tokenizer

WORDS = ["the", "dog's", "14", "die", "Äpfel", "собака", "и", "яблоко", "犬と林檎。", "\n", "  ", "🙂", "naïve"]
GERMAN = PreprocessSettings(language="de", limits=Limits(block_bytes=3000))


def documents(count: int, seed: int) -> list[str]:
    generator = numpy.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size)) + "." for size in generator.integers(1, 60, count)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outputs")
    languages = ["de", "ru", "de", "zh-Hans"]
    lines = [
        json.dumps({"text": text, "meta": {"title": text[:9].strip(), "lang": languages[n % 4]}})
        for n, text in enumerate(documents(200, 1))
    ]
    (path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:60]).encode()))
    (path / "text.txt").write_text("\n".join(documents(300, 3)), encoding="utf-8")
    train_tokenizer([path / "a.jsonl"], path / "tok", 320, show_progress=False)
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "text.txt"),
        model_prefix=str(path / "sp"),
        vocab_size=330,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return path


def bytes_of(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


@pytest.mark.parametrize(
    ("kind", "vocabulary"),
    slow_except(
        [("huggingface", None), ("huggingface", 65_600), ("sentencepiece", None)],
        ("huggingface", None),
        ("sentencepiece", None),
    ),
)
def test_the_bytes_are_those_of_megatrons_tool(
    directory: Path, tmp_path: Path, kind: str, vocabulary: int | None
) -> None:
    """Megatron-LM's tools/preprocess_data.py with --append-eod: documents are encoded with the tokenizer's own library
    and passed to Megatron-Core's builder, whose dtype depends on the vocabulary size."""
    if kind == "huggingface":
        path = directory / "tok"
        if vocabulary is not None:
            # Above 65,500 ids Megatron-Core stores 32 bits.
            path = tmp_path / "tok"
            large = transformers.AutoTokenizer.from_pretrained(directory / "tok")
            large.add_tokens([f"<extra_{n}>" for n in range(vocabulary - len(large))])
            large.save_pretrained(path)
        reference = transformers.AutoTokenizer.from_pretrained(path)
        size, eod = len(reference), reference.eos_token_id
        rows = [reference(text, add_special_tokens=False)["input_ids"] for text in documents(200, 1)]
    else:
        path = directory / "sp.model"
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        size, eod = processor.get_piece_size(), processor.eos_id()
        rows = [processor.encode(text) for text in documents(200, 1)]
    builder = IndexedDatasetBuilder(str(tmp_path / "megatron.bin"), dtype=DType.optimal_dtype(size))
    for row in rows:
        builder.add_document([*row, eod], [len(row) + 1])
    builder.finalize(str(tmp_path / "megatron.idx"))
    preprocess([directory / "a.jsonl"], path, tmp_path / "out", GERMAN, show_progress=False)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "megatron")
    sidecar = load_sidecar(tmp_path / "out")
    assert sidecar.engine == {"huggingface": "gigatoken", "sentencepiece": "sentencepiece"}[kind]
    assert open_indexed(tmp_path / "out").index.dtype == (numpy.uint16 if vocabulary is None else numpy.int32)


def test_keys_and_languages_write_separate_datasets(directory: Path, tmp_path: Path) -> None:
    fields = Fields(("text", "meta.title"), language_key="meta.lang")
    settings = replace(GERMAN, language=None, fields=fields, workers=2)
    result = preprocess([directory / "a.jsonl"], directory / "tok", tmp_path / "x", settings, show_progress=False)
    records = [json.loads(line) for line in (directory / "a.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(directory / "tok")
    expected = {}
    for key, get in (("text", lambda r: r["text"]), ("meta.title", lambda r: r["meta"]["title"])):
        for language in ("de", "ru", "zh-Hans"):
            rows = [tokenizer.encode(get(r)) for r in records if r["meta"]["lang"] == language and get(r)]
            expected[str(tmp_path / f"x_{key}_{language}")] = [[*row, 0] for row in rows]
    assert result.outputs.keys() == expected.keys()
    for prefix, rows in expected.items():
        dataset = open_indexed(prefix)
        assert [row.tolist() for row in dataset] == rows
        sidecar = load_sidecar(prefix)
        assert (sidecar.documents, sidecar.language) == (len(rows), prefix.rpartition("_")[2])
        assert sidecar.text_keys == [prefix.rpartition("/")[2].split("_")[1]]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == sorted([".bin", ".idx", ".json"] * 6)


def test_joined_keys(directory: Path, tmp_path: Path) -> None:
    arguments = ["--input", str(directory / "b.jsonl.gz"), "--tokenizer", str(directory / "tok"), "--language", "de"]
    arguments += ["--text-key", "meta.title", "text", "--join", "\\n", "--workers", "1"]
    assert main(["preprocess", *arguments, "--output", str(tmp_path / "x")]) == 0
    records = [json.loads(line) for line in (directory / "a.jsonl").read_text().splitlines()[:60]]
    tokenizer = load_tokenizer(directory / "tok")
    texts = ["\n".join(part for part in (r["meta"]["title"], r["text"]) if part) for r in records]
    dataset = open_indexed(tmp_path / "x")
    assert [row.tolist() for row in dataset] == [[*tokenizer.encode(text), 0] for text in texts]
    assert load_sidecar(tmp_path / "x").text_keys == ["meta.title", "text"]


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("segmenter", [None, "support.word_cutters:KnownWords"])
def test_merged_shards_equal_the_complete_dataset(
    directory: Path, tmp_path: Path, count: int, segmenter: str | None
) -> None:
    # With 40 shards some are empty, because a compressed file belongs to one shard.
    inputs = [directory / "a.jsonl", directory / "b.jsonl.gz"]
    settings = replace(GERMAN, segmenter=segmenter)
    preprocess(inputs, directory / "tok", tmp_path / "complete", settings, show_progress=False)
    for number in range(1, count + 1):
        preprocess(inputs, directory / "tok", tmp_path / "x", replace(settings, shard=(number, count)), False)
    prefixes = [str(tmp_path / f"x_{number:05d}-of-{count:05d}") for number in range(1, count + 1)]
    documents_of_shards = [load_sidecar(prefix).documents for prefix in prefixes]
    assert sum(documents_of_shards) == 260 and (0 in documents_of_shards) == (count == 40)
    assert main(["dataset", "merge", "--input", *reversed(prefixes), "--output", str(tmp_path / "merged")]) == 0
    assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "complete")
    if segmenter is not None:
        assert (tmp_path / "merged.words").read_bytes() == (tmp_path / "complete.words").read_bytes()


def test_lines_of_a_shard_are_located_by_byte(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 10 + "bad\n" + '{"text": "two"}\n' * 3)
    arguments = ["--input", str(path), "--tokenizer", str(directory / "tok"), "--language", "de", "--workers", "1"]
    assert main(["preprocess", *arguments, "--output", str(tmp_path / "x"), "--shard", "2/2"]) == 2
    assert_facts(capsys.readouterr().err, f"{path}:byte 160: invalid JSON")
    for shard in ("0/2", "3/2", "1", "a/b", "1/0", "x1/2"):
        status = main(["preprocess", *arguments, "--output", str(tmp_path / "x"), "--shard", shard])
        assert_refused(status, capsys.readouterr().err, "--shard is", shard)
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


FAKE_GIGATOKEN = """
import awkward
import numpy
import tokenizers

class Tokenizer:
    def __init__(self, data):
        self.tokenizer = tokenizers.Tokenizer.from_str(data.decode())
    @classmethod
    def from_json(cls, data):
        return cls(data)
    def encode_batch(self, texts):
        rows = [self.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        # Wrong in every document that contains this word.
        return awkward.Array([
            numpy.array([7] + row[1:] if "WRONG" in text else row, dtype=numpy.uint32)
            for text, row in zip(texts, rows)
        ])
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_wrong_ids_of_the_fast_engine_are_noticed(
    directory: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/gigatoken.py").write_text(FAKE_GIGATOKEN)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "gigatoken"]:
        monkeypatch.delitem(sys.modules, name)
    right = [f"right {n} " + "word " * 30 for n in range(100)]
    path = tmp_path / "a.jsonl"
    # A single wrong document is between those that are compared; a block of wrong documents is noticed.
    texts = [*right[:53], "one WRONG document", *right[53:], *["WRONG " * 20] * 60, *right]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = replace(GERMAN, workers=workers)
    result = preprocess([path], directory / "tok", tmp_path / "x", settings, show_progress=False)
    assert_facts(result.sidecar.engine, "gigatoken", f"tokenizers from {path}:")
    line = int(result.sidecar.engine.split(":")[1].split()[0])
    assert 102 <= line <= 161
    # From that block on, the plain tokenizer encodes everything, including blocks already in flight.
    tokenizer = load_tokenizer(directory / "tok")
    dataset = open_indexed(tmp_path / "x")
    wrong = [n for n, text in enumerate(texts) if dataset[n].tolist() != [*tokenizer.encode(text), 0]]
    assert all("WRONG" in texts[n] for n in wrong)
    assert max(wrong) < line <= 161
    settings = replace(settings, use_fast_engine=False)
    plain = preprocess([path], directory / "tok", tmp_path / "plain", settings, show_progress=False)
    assert plain.sidecar.engine == "tokenizers"
    assert [row.tolist() for row in open_indexed(tmp_path / "plain")] == [[*tokenizer.encode(t), 0] for t in texts]


@pytest.mark.slow
def test_the_engine_change_depends_only_on_the_text(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake/gigatoken.py").write_text(FAKE_GIGATOKEN)
    monkeypatch.syspath_prepend(str(tmp_path / "fake"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "gigatoken"]:
        monkeypatch.delitem(sys.modules, name)
    # A block has ten documents. The third block is entirely wrong; in each later block, which may be in flight by then,
    # one document is wrong, but none of the three that are compared.
    wrong = [n // 10 == 2 or (n >= 30 and n % 10 == 3) for n in range(200)]
    lines = [json.dumps({"text": f"{'WRONG' if wrong[n] else 'right'} {n:04}"}) + "\n" for n in range(200)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(lines))
    for workers in (1, 2, 3):
        settings = replace(GERMAN, workers=workers, limits=Limits(block_bytes=10 * len(lines[0])))
        preprocess([path], directory / "tok", tmp_path / f"w{workers}", settings, show_progress=False)
    assert bytes_of(tmp_path / "w1") == bytes_of(tmp_path / "w2") == bytes_of(tmp_path / "w3")
    assert (tmp_path / "w1.json").read_bytes() == (tmp_path / "w3.json").read_bytes()
    assert_facts(load_sidecar(tmp_path / "w1").engine, "gigatoken", f"tokenizers from {path}:22 on")


def test_added_tokens_in_a_text_go_to_the_library(directory: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "tok")
    tokenizer.add_tokens(["<mark>"])
    tokenizer.save_pretrained(tmp_path / "tok")
    path = tmp_path / "a.txt"
    # Many names share a prefix.
    text = "one <map> <mark> two <eod>"
    path.write_text(f"{text}\n\nthree")
    result = preprocess([path], tmp_path / "tok", tmp_path / "x", GERMAN, show_progress=False)
    assert result.sidecar.engine == "gigatoken"
    loaded = load_tokenizer(tmp_path / "tok")
    dataset = open_indexed(tmp_path / "x")
    assert [row.tolist() for row in dataset] == [
        [*loaded.encode(text), 0],
        [*loaded.encode("three"), 0],
    ]
    assert 320 in dataset[0] and dataset[0].tolist().count(0) == 1
    # The engine also encodes the names of special tokens as plain text.
    engine = loaded.fast_engine()
    assert engine is not None and engine(["<eod>"])[0].tolist() == loaded.encode("<eod>")
    with pytest.raises(UnsuitableTextError):
        engine(["a", "<mark>"])


BAD = [
    (
        ["--language-key", "lang"],
        '{"text": "a", "lang": "../x"}',
        ("a.jsonl:1: ", "'lang' is '../x'"),
    ),
    (["--language-key", "lang"], '{"text": "a"}', ("a.jsonl:1: ", "no key 'lang'")),
    (["--language-key", "lang", "--language", "de"], "{}", ("--language", "--language-key", "got both")),
    ([], "{}", ("--language", "--language-key", "got neither")),
    (["--language", "de", "--text-key", "a", "a"], "{}", ("--text-key is 'a a'",)),
    (
        ["--language", "de", "--text-key", "a/b", "c"],
        '{"a/b": "x", "c": "y"}',
        ("--text-key is 'a/b c'", "'/'", "--join"),
    ),
    (
        ["--language-key", "l", "--text-key", "a", "a_b"],
        '{"a": "x", "a_b": "y", "l": "b_c"}\n{"a": "x", "a_b": "y", "l": "c"}',
        ("a.jsonl: ", "'a' in b_c and 'a_b' in c", "x_a_b_c"),
    ),
    (["--language", "de", "--max-document-mb", "0"], "{}", ("--max-document-mb is 0, expected",)),
    (["--language", "de", "--max-document-mb", "inf"], "{}", ("--max-document-mb is inf",)),
    (
        ["--language", "de", "--max-document-mb", "0.0001"],
        '{"text": "%s"}' % ("x" * 200),
        ("a.jsonl:1: ", "longer than 9.91821e-05 MiB", "--max-document-mb"),
    ),
    (["--language", "de", "--save-every-mb", "-1"], "{}", ("--save-every-mb is -1, expected",)),
]


@pytest.mark.parametrize(("options", "line", "facts"), BAD)
def test_errors(
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    line: str,
    facts: tuple[str, ...],
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(line)
    arguments = ["--input", str(path), "--tokenizer", str(directory / "tok"), "--workers", "1", *options]
    assert main(["preprocess", *arguments, "--output", str(tmp_path / "x")]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert_facts(errors[0], *facts)
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_run_over_another_dataset_leaves_nothing_of_it(directory: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "x", replace(GERMAN, overwrite=True)
    preprocess(
        [directory / "a.jsonl"],
        directory / "tok",
        out,
        replace(GERMAN, segmenter="support.word_cutters:KnownWords"),
        False,
    )
    preprocess([directory / "b.jsonl.gz"], directory / "tok", out, again, show_progress=False)
    preprocess([directory / "b.jsonl.gz"], directory / "tok", tmp_path / "y", GERMAN, show_progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{ending}" for name in "xy" for ending in ("bin", "idx", "json")
    )
    assert (tmp_path / "x.json").read_bytes() == (tmp_path / "y.json").read_bytes()


def command(directory: Path, name: str, out: Path, *options: str) -> int:
    arguments = ["--input", str(directory / name), "--tokenizer", str(directory / "tok"), "--workers", "1"]
    return main(["preprocess", *arguments, "--output", str(out), *options])


@pytest.mark.parametrize("languages", [["--language", "de"], ["--language-key", "meta.lang"]])
def test_a_finished_dataset_is_kept(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], languages: list[str]
) -> None:
    out = tmp_path / "x"
    assert command(directory, "a.jsonl", out, *languages) == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == (3 if languages[0] == "--language" else 9)
    capsys.readouterr()
    # Started again, like a job array.
    assert command(directory, "a.jsonl", out, *languages, "--resume") == 0
    assert capsys.readouterr().out.count("already complete") == len(before) // 3
    # Any other run is an error.
    for name, options in [
        ("a.jsonl", []),
        ("b.jsonl.gz", ["--resume"]),
        ("a.jsonl", ["--text-key", "meta.title", "--resume"]),
    ]:
        assert command(directory, name, out, *languages, *options) == 2
        assert_facts(capsys.readouterr().err, f"error: {out}", "already exists", "--overwrite")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert command(directory, "b.jsonl.gz", out, *languages, "--overwrite") == 0
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} != before


def test_files_without_a_sidecar_are_kept(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.bin").write_bytes(b"of Megatron's own tool")
    assert command(directory, "a.jsonl", tmp_path / "x", "--language", "de", "--resume") == 2
    assert_facts(capsys.readouterr().err, f"error: {tmp_path / 'x.bin'}: ", "already exists")
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_hub_and_tables(directory: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "set").mkdir()
    shutil.copy(directory / "a.jsonl", tmp_path / "set/a.jsonl")
    preprocess([f"hf:{tmp_path}/set"], directory / "tok", tmp_path / "hub", GERMAN, show_progress=False)
    preprocess([directory / "a.jsonl"], directory / "tok", tmp_path / "file", GERMAN, show_progress=False)
    assert bytes_of(tmp_path / "hub") == bytes_of(tmp_path / "file")


def test_rows_of_a_shard_are_counted_from_the_first_of_the_table(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [text if n != 25 else "" for n, text in enumerate(documents(40, 1))]})
    pyarrow.parquet.write_table(table, path, row_group_size=10)
    found = []
    for number in (1, 2, 3):
        settings = replace(GERMAN, shard=(number, 3))
        result = preprocess([path], directory / "tok", tmp_path / "x", settings, show_progress=False)
        found += [problem.where for problem in result.sidecar.skipped]
    assert found == [f"{path}:row 26"]


def test_a_document_with_an_invalid_language_can_be_skipped(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "l": "de"}\n{"text": "b", "l": "../x"}\n{"text": "c", "l": "de"}\n')
    settings = replace(GERMAN, language=None, fields=Fields(language_key="l"), on_error="skip")
    result = preprocess([path], directory / "tok", tmp_path / "x", settings, show_progress=False)
    assert result.outputs.keys() == {str(tmp_path / "x_de")}
    assert (result.sidecar.documents, result.sidecar.skipped[0].where) == (2, f"{path}:2")


def test_a_shard_without_documents_and_language(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "l": "de"}\n')
    arguments = ["--input", str(path), "--tokenizer", str(directory / "tok"), "--language-key", "l", "--workers", "1"]
    assert main(["preprocess", *arguments, "--output", str(tmp_path / "x"), "--shard", "2/2"]) == 0
    assert "no documents in this shard" in capsys.readouterr().out
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_more_languages_than_files_may_be_open(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}", "l": f"l{n}"}) + "\n" for n in range(90)))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    settings = replace(GERMAN, language=None, fields=Fields(language_key="l"))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (150, limits[1]))
        result = preprocess([path], directory / "tok", tmp_path / "x", settings, show_progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [sidecar.documents for sidecar in result.outputs.values()] == [1] * 90


def test_long_documents_are_compared_in_part(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": "word " * 1000 + text}) for text in documents(6, 3)))
    result = preprocess([path], directory / "tok", tmp_path / "x", GERMAN, show_progress=False)
    assert result.sidecar.engine == "gigatoken"
    settings = replace(GERMAN, segmenter="support.word_cutters:KnownWords")
    result = preprocess([path], directory / "tok", tmp_path / "y", settings, show_progress=False)
    assert result.sidecar.engine == "tokenizers"
    assert bytes_of(tmp_path / "x") == bytes_of(tmp_path / "y")


def test_all_bad_lines_are_counted(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("bad\n" * 300 + '{"text": "good"}\n')
    result = preprocess(
        [path], directory / "tok", tmp_path / "x", replace(GERMAN, on_error="skip"), show_progress=False
    )
    assert (result.sidecar.skipped_count, len(result.sidecar.skipped)) == (300, 100)


@pytest.mark.parametrize("count", [3, 4])
def test_too_many_languages(directory: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess_module, "_MOST_DATASETS", 3)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "x", "l": f"l{min(n // 100, count - 1)}"}) + "\n" for n in range(400)))
    settings = replace(GERMAN, language=None, fields=Fields(language_key="l"))
    if count == 3:
        result = preprocess([path], directory / "tok", tmp_path / "x", settings, show_progress=False)
        assert len(result.outputs) == 3
        return
    # The languages saved by an earlier run count, too.
    for resume in (False, True):
        settings = replace(settings, resume=resume, limits=Limits(block_bytes=60), save_every_bytes=60)
        with user_error(f"{path}: ", "'l'", "more than 3 datasets", "--language-key"):
            preprocess([path], directory / "tok", tmp_path / "x", settings, show_progress=False)
        assert (tmp_path / "x.unfinished").exists()


def test_a_file_name_that_is_not_utf8(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"caf\xe9.jsonl")
    lines = [*(json.dumps({"text": text}) for text in documents(20, 1)), "bad"]
    try:
        (tmp_path / "in" / name).write_text("\n".join(lines))
    except OSError:
        pytest.skip("this file system only accepts UTF-8 names")
    arguments = ["--input", str(tmp_path / "in"), "--tokenizer", str(directory / "tok"), "--language", "de"]
    # Save often.
    arguments += ["--workers", "1", "--on-error", "skip", "--save-every-mb", "0.0001"]
    assert main(["preprocess", *arguments, "--output", str(tmp_path / "x")]) == 0
    assert "caf\\udce9.jsonl:21: invalid JSON" in capsys.readouterr().out
    assert load_sidecar(tmp_path / "x").inputs[0].path == str(tmp_path / "in" / name)
