"""Preprocessing: Megatron-Core reads the output, workers change nothing, and errors leave no files."""

import gzip
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from support.messages import assert_facts, assert_refused, user_error

from megatron_prealign.cli import main
from megatron_prealign.corpus.blocks import Block, Limits
from megatron_prealign.corpus.readers import Fields
from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.files.checksum import file_checksum
from megatron_prealign.preprocess import run as module
from megatron_prealign.preprocess import tokenise as tokenise_module
from megatron_prealign.preprocess import worker_pool as pool_module
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.preprocess.tokenise import BlockTokeniser, Route, TokeniserSettings
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer

GERMAN = PreprocessSettings(language="de")
WORDS = [
    "the",
    "dog's",
    "owner",
    "counts",
    "14",
    "apples",
    "die",
    "Äpfel",
    "собака",
    "и",
    "яблоко",
    "犬と林檎。",
    "<eod>",
]


def documents(count: int, seed: int) -> list[str]:
    generator = numpy.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size)) for size in generator.integers(1, 60, count)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preprocess")
    lines = [json.dumps({"text": text, "body": text.upper()}) for text in documents(300, 1)]
    (path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (path / "b.txt.gz").write_bytes(gzip.compress("\n\n".join(documents(200, 2)).encode()))
    train_tokenizer([path / "a.jsonl"], path / "tok", 320, show_progress=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return load_tokenizer(directory / "tok")


def run(directory: Path, out: Path, *arguments: str) -> int:
    """The command with defaults; later options win over earlier ones."""
    return main(
        ["preprocess", "--tokenizer", str(directory / "tok"), "--output", str(out), "--language", "de", *arguments]
    )


def test_megatron_core_reads_the_tokens_back(directory: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    inputs = [directory / "a.jsonl", directory / "b.txt.gz"]
    result = preprocess(inputs, directory / "tok", tmp_path / "new/de", GERMAN, show_progress=False)
    texts = [*documents(300, 1), *documents(200, 2)]
    expected = [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]
    dataset = IndexedDataset(str(tmp_path / "new/de"))
    assert dataset.index.dtype == numpy.uint16
    assert [row.tolist() for row in dataset] == expected
    assert dataset.document_indices.tolist() == list(range(501))
    assert all(tokenizer.eod_id not in row[:-1] for row in expected)
    sidecar = load_sidecar(tmp_path / "new/de")
    assert sidecar == result.sidecar
    assert (sidecar.documents, sidecar.tokens) == (500, sum(map(len, expected)))
    assert sidecar.bytes == sum(len(text.encode()) for text in texts)
    assert (sidecar.language, sidecar.eod_id, sidecar.append_eod, sidecar.bos) == ("de", 0, True, False)
    assert sidecar.tokenizer.fingerprint == tokenizer.fingerprint
    assert sidecar.tokenizer.vocab_size == 320
    assert [(item.path, item.bytes) for item in sidecar.inputs] == [(str(p), p.stat().st_size) for p in inputs]
    assert sidecar.engine == "gigatoken" and sidecar.text_keys == ["text"] and sidecar.shard is None
    for ending in ("bin", "idx"):
        assert sidecar.checksums[ending] == file_checksum(tmp_path / f"new/de.{ending}")
    # Every sixteenth document of a block; the text after the last blank line of a text file is a separate block.
    sample = [*documents(300, 1)[::16], *documents(200, 2)[:199:16], documents(200, 2)[199]]
    ratio = sum(len(tokenizer.encode(text)) for text in sample) / sum(len(text.split()) for text in sample)
    assert result.tokens_per_word == pytest.approx(ratio, rel=1e-12)  # the same division of the same integers
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["de.bin", "de.idx", "de.json"]


@pytest.mark.slow
def test_workers_do_not_change_a_byte(directory: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"text": ""}\nx\n{"text": "b"}\n')
    for workers in (1, 2):
        inputs = [directory / "a.jsonl", bad, directory / "b.txt.gz"]
        # Small blocks, so that there are many more than fit in flight.
        settings = replace(GERMAN, on_error="skip", workers=workers, limits=Limits(block_bytes=700))
        preprocess(inputs, directory / "tok", tmp_path / f"w{workers}", settings, show_progress=False)
    for ending in ("bin", "idx", "json"):
        assert (tmp_path / f"w1.{ending}").read_bytes() == (tmp_path / f"w2.{ending}").read_bytes()
    sidecar = load_sidecar(tmp_path / "w2")
    assert (sidecar.documents, sidecar.skipped_count) == (502, 2)
    assert [problem.where for problem in sidecar.skipped] == [f"{bad}:2", f"{bad}:3"]
    with user_error(f"{bad}:3: invalid JSON"):
        preprocess([bad, directory / "a.jsonl"], directory / "tok", tmp_path / "w3", replace(GERMAN, workers=2), False)
    assert not list(tmp_path.glob("*w3*"))


def test_command(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(directory / "a.jsonl"), str(directory / "b.txt.gz")]
    assert run(directory, tmp_path / "x", "--input", *files, "--workers", "1") == 0
    printed = capsys.readouterr().out
    for part in ("documents        500", "tokens per word", "MB of text per second", "skipped          0"):
        assert part in printed
    assert run(directory, tmp_path / "y", "--input", files[0], "--text-key=body", "--workers=1") == 0
    dataset = open_indexed(tmp_path / "y")
    first = json.loads((directory / "a.jsonl").read_text().splitlines()[0])
    assert dataset[0].tolist() == [*load_tokenizer(directory / "tok").encode(first["body"]), 0]


def test_empty_documents_are_counted(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": " \\n\\t "}\n{"text": "x"}\n')
    assert run(directory, tmp_path / "x", "--input", str(path), "--workers", "1") == 0
    assert f"{path}:2: empty document" in capsys.readouterr().out
    sidecar = load_sidecar(tmp_path / "x")
    assert (sidecar.documents, sidecar.skipped_count) == (1, 2)


def test_clone_language(directory: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "tok").mkdir()
    for path in (directory / "tok").iterdir():
        (tmp_path / "tok" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tok/clone.json").write_text('{"language": "en_clone"}')
    for language in ("en", "en_clone"):
        preprocess(
            [directory / "a.jsonl"], tmp_path / "tok", tmp_path / language, PreprocessSettings(language=language), False
        )
    plain, clone = open_indexed(tmp_path / "en"), open_indexed(tmp_path / "en_clone")
    for text, row, cloned in zip(documents(300, 1), plain, clone, strict=True):
        assert row.tolist() == [*tokenizer.encode(text), 0]
        assert cloned.tolist() == [*(index + 320 for index in tokenizer.encode(text)), 0]


BAD_FILES = {
    "not JSON": ("bad.jsonl", b'{"text": "a"}\n{"text": \n', ":2: invalid JSON"),
    "not an object": ("bad.jsonl", b"[1]\n", ":1: got a JSON array"),
    "no text": ("bad.jsonl", b'{"txt": "a"}\n', ":1: no key 'text'"),
    "not a string": ("bad.jsonl", b'{"text": ["a"]}\n', ":1: value of 'text' is a JSON array"),
    "not UTF-8": ("bad.txt", b"caf\xe9\n", ":1: not UTF-8"),
    "empty": ("bad.jsonl", b"", ": empty file"),
    "only blank": ("bad.txt", b"\n \n", "only white space"),
    "cut gzip": ("bad.txt.gz", gzip.compress(b"text " * 5000)[:-20], ":1: truncated gzip data"),
    "unknown extension": ("bad.csv", b"a,b", "bad.csv: unsupported file type"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_inputs_end_with_status_2_and_one_line(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    name, content, fact = BAD_FILES[kind]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    good = [] if kind == "only blank" else [str(tmp_path / "good.txt")]
    assert run(directory, tmp_path / "x", "--input", *good, str(tmp_path / name), "--workers", "1") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert_facts(lines[0], fact)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "good.txt"])


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--input", "{tmp}/missing.jsonl"], ("missing.jsonl: ", "not found")),
        (["--workers", "0"], ("workers is 0", "at least 1")),
        (["--language", " "], ("--language is ' '", "language code")),
        (["--output", "{tmp}/x.words"], ("x.words", ".bin, .idx, .json")),
        (["--output", "{tmp}"], ("{tmp}", "is a directory")),
        (["--tokenizer", "{tmp}/none"], ("{tmp}/none: tokenizer", "not found")),
        (["--on-error", "ignore"], ("--on-error is ignore", "stop, skip")),
        (["--inputs", "x"], ("unknown option --inputs",)),
    ],
)
def test_bad_options(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], facts: tuple[str, ...]
) -> None:
    filled = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    status = run(directory, tmp_path / "x", "--input", str(directory / "a.jsonl"), "--workers", "1", *filled)
    assert_refused(status, capsys.readouterr().err, *(fact.replace("{tmp}", str(tmp_path)) for fact in facts))
    assert not list(tmp_path.iterdir())


class OneIdTooLarge(Tokenizer):
    """Returns an id outside its vocabulary for one word."""

    def __init__(self, base: Tokenizer, index: int) -> None:
        self.__dict__.update(base.__dict__)
        self.base, self.index = base, index

    def encode_batch(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        return [[self.index] if text == "wrong" else self.base.encode(text) for text in texts]

    encode = encode_words = encode_with_offsets = decode = word_boundaries = None  # type: ignore[assignment]


def test_ids_outside_the_vocabulary_are_rejected_before_the_cast(tokenizer: Tokenizer) -> None:
    settings = TokeniserSettings("", Fields(), Limits(), "de", None)
    block = Block("lines", b'{"text": "a"}\n\n{"text": "wrong"}\n', 1, 0)
    # 65,536 + 3 would silently become 3 in 16 bits.
    for index in (65_539, -1, 320):
        result = BlockTokeniser(settings, OneIdTooLarge(tokenizer, index))(block, plain=True)
        assert result.fatal_error is not None and result.fatal_error[0] == 2
        assert_facts(result.fatal_error[1], f"id {index}, expected 0 to 319")
    result = BlockTokeniser(settings, OneIdTooLarge(tokenizer, 319))(block, plain=True)
    assert result.fatal_error is None and result.routes[Route(0, "de")].ids[-2:].tolist() == [319, 0]


def test_interrupt_leaves_nothing(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_sidecar", interrupt)
    assert run(directory, tmp_path / "x", "--input", str(directory / "a.jsonl"), "--workers", "1") == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["preprocess", "train-tokenizer"])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = f"""
import sys
from megatron_prealign.cli import main
try:
    main(["{command}", "--help"])
except SystemExit:
    pass
heavy = {{"torch", "numpy", "transformers", "tokenizers", "sentencepiece"}} & set(sys.modules)
sys.exit(f"loaded {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--input" in done.stdout


class Counting:
    """A lock that counts how often it was acquired."""

    taken = 0

    def __enter__(self) -> None:
        self.taken += 1

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("segmenter", [None, "support.word_cutters:KnownWords"])
def test_large_texts_are_encoded_one_at_a_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch, segmenter: str | None
) -> None:
    monkeypatch.setattr(tokenise_module, "_LARGE_CHARACTERS", 10)
    settings = TokeniserSettings(str(directory / "tok"), Fields(), Limits(), "de", segmenter)
    lock = Counting()
    tokenise = BlockTokeniser(settings, large_texts=lock)
    tokenise(Block("lines", json.dumps({"text": "x" * 10}).encode(), 1, 0), plain=True)
    assert lock.taken == 0
    tokenise(Block("lines", json.dumps({"text": "x" * 11}).encode(), 1, 0), plain=True)
    assert lock.taken == 1


def test_workers_share_the_lock(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenise_module, "_LARGE_CHARACTERS", 10)
    monkeypatch.setattr(pool_module, "_worker", None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    settings = TokeniserSettings(str(directory / "tok"), Fields(), Limits(), "de", None)
    before, lock = signal.getsignal(signal.SIGINT), Counting()
    try:
        pool_module._start_worker(settings, lock)
    finally:
        signal.signal(signal.SIGINT, before)
    pool_module._tokenise_in_worker(Block("lines", json.dumps({"text": "x" * 11}).encode(), 1, 0), True)
    assert lock.taken == 1


@pytest.mark.parametrize("bytes_in_flight, most", [(1 << 28, 4), (20, 2)])
def test_blocks_are_not_fetched_far_ahead(
    directory: Path, monkeypatch: pytest.MonkeyPatch, bytes_in_flight: int, most: int
) -> None:
    monkeypatch.setattr(pool_module, "_BYTES_IN_FLIGHT", bytes_in_flight)
    settings = TokeniserSettings(str(directory / "tok"), Fields(), Limits(), "de", None)
    fetched = 0

    def blocks() -> Iterator[Block]:
        nonlocal fetched
        for number in range(12):
            fetched += 1
            yield Block("lines", b'{"text": "x"}', number + 1, 0)

    results = pool_module.tokenise_in_order(blocks(), BlockTokeniser(settings), 2, pool_module.EngineChoice(True))
    for number, (block, _) in enumerate(results):
        assert block.next_position == number + 1 and fetched - number <= most
    assert fetched == 12


def test_documents_without_a_token_make_no_dataset(directory: Path, tmp_path: Path) -> None:
    class Nothing(Tokenizer):
        def __init__(self, base: Tokenizer) -> None:
            self.__dict__.update(base.__dict__)

        def encode_rows(self, texts: Sequence[str], language: str | None = None) -> tuple[Any, Any]:
            return numpy.zeros(0, dtype=numpy.int64), numpy.zeros(len(texts) + 1, dtype=numpy.int64)

        encode = encode_words = encode_with_offsets = decode = word_boundaries = None  # type: ignore[assignment]

    settings = TokeniserSettings("", Fields(), Limits(), "de", None)
    block = Block("lines", b'{"text": "a"}\nbad\n{"text": "b"}\n', 1, 0)
    result = BlockTokeniser(settings, Nothing(load_tokenizer(directory / "tok")))(block, plain=True)
    assert result.routes == {} and [number for number, _, _ in result.problems] == [0, 1, 2]


def test_one_engine_serves_all_languages(directory: Path) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = load_tokenizer(directory / "tok")
    assert tokenizer.fast_engine("de") is tokenizer.fast_engine("en") is not None


def test_first_and_last_tokens_of_a_document_start_words(directory: Path) -> None:
    settings = TokeniserSettings(str(directory / "tok"), Fields(), Limits(), "de", "support.word_cutters:KnownWords")
    block = Block("lines", '{"text": "苹果银行"}\n{"text": "银行"}\n'.encode(), 1, 0)
    found = BlockTokeniser(settings)(block, plain=False).routes[Route(0, "de")]
    assert found.word_starts is not None
    ends = numpy.cumsum(found.lengths)
    assert found.word_starts[ends - 1].all() and found.word_starts[ends - found.lengths].all()
    assert not found.word_starts.all()
