"""`dataset verify`: intact files pass, and all problems of corrupt files are reported at once."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dataset_parts import EOD, VOCAB_SIZE, make_dataset, random_documents, write_tokens
from support.messages import assert_facts, assert_refused, user_error
from support.sidecars import save_sidecar

from megatron_prealign import cli
from megatron_prealign.data.commands import verify as verify_module
from megatron_prealign.data.commands.verify import verify
from megatron_prealign.data.indexed import import_indexed_dataset
from megatron_prealign.data.sidecar import TokenizerRecord, load_sidecar
from megatron_prealign.data.sources import open_training_sources
from megatron_prealign.files import checksum
from megatron_prealign.recipe.data import DataSection, DataSource
from megatron_prealign.run.validate import _check_source
from megatron_prealign.text import plural


def problems(prefix: str, **options: object) -> list[str]:
    return verify(prefix, show_progress=False, **options).problems  # type: ignore[arg-type]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (checksum, verify_module):
        monkeypatch.setattr(module, "CHECKSUM_BLOCK", 64)
    monkeypatch.setattr(verify_module, "_READ_BYTES", 16)
    monkeypatch.setattr(verify_module, "_CHUNK", 3)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_intact_datasets(tmp_path, capsys, workers, dtype):
    documents = random_documents(40, seed=1)
    for name, segmenter in (("plain", None), ("marked", "jieba")):
        prefix = make_dataset(tmp_path / name, documents, segmenter=segmenter, dtype=dtype)
        assert cli.main(["dataset", "verify", "--input", prefix, "--workers", str(workers)]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"{prefix}: no problems; checked index of 40 documents, ")
        assert_facts(printed, "ids and the end of every document", "checksum of .bin", "checksum of .idx")
        assert ("word bitmap" in printed) == ("checksum of .words" in printed) == (segmenter is not None)


def test_missing_checksums_and_empty_shards(tmp_path):
    result = verify(make_dataset(tmp_path / "a", random_documents(4, seed=1), checksums=()), show_progress=False)
    assert result.problems == []
    assert "no checksums" in result.checked[-1]
    assert problems(make_dataset(tmp_path / "b", [], shard="2/2")) == []
    (problem,) = problems(make_dataset(tmp_path / "c", []))
    assert_facts(problem, f"{tmp_path}/c.idx", "no tokens", "megatron-prealign preprocess")


def patch_tokens(place: int, value: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        tokens = np.fromfile(f"{prefix}.bin", np.uint16)
        tokens[place] = value
        tokens.tofile(f"{prefix}.bin")

    return change


def change_sidecar(**fields: object) -> Callable[[Path], None]:
    return lambda prefix: save_sidecar(replace(load_sidecar(prefix), **fields), prefix)  # type: ignore[arg-type]


def write(ending: str, content: bytes | None = None, cut: int = 0) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        path = Path(f"{prefix}.{ending}")
        data = path.read_bytes() if content is None else content
        path.write_bytes(data[: len(data) - cut])

    return change


def set_bits(place: int, value: int) -> Callable[[Path], None]:
    def change(prefix: Path) -> None:
        data = bytearray(Path(f"{prefix}.words").read_bytes())
        data[place] = value
        Path(f"{prefix}.words").write_bytes(data)

    return change


OTHER = TokenizerRecord("x", "sha256:bb", 70_000)
# Documents of [9, 8, EOD], [EOD], [7, EOD]: tokens 2, 3 and 5 end them.
DAMAGE = {
    "an id too large": (patch_tokens(1, VOCAB_SIZE), ["got ids from 3 to 1000, expected 0 to 999", "a.bin: checksum"]),
    "a document without an end": (
        patch_tokens(3, 20),
        ["1 document without the end-of-document id 3 at the end, first document 1 ", "a.bin: checksum"],
    ),
    "an end inside": (patch_tokens(1, EOD), ["occurs 1 times inside documents, first at token 1 ", "a.bin: checksum"]),
    "a flipped bit": (patch_tokens(0, 10), ["a.bin: checksum is xxh3:"]),
    "tokens cut": (write("bin", cut=1), ["a.bin: got 11 bytes, expected 12", "a.bin: checksum"]),
    "no tokens": (write("bin", b""), ["a.bin: got 0 bytes, expected 12", "a.bin: checksum"]),
    "index cut": (write("idx", cut=1), ["a.idx: got 101 bytes, expected 102", "a.idx: checksum"]),
    "no index": (lambda prefix: os.unlink(f"{prefix}.idx"), ["a.idx: file not found"]),
    "only a sidecar": (
        lambda prefix: [os.unlink(f"{prefix}.{ending}") for ending in ("bin", "idx", "words")],
        ["a.idx: file not found", "a.bin: file not found"],
    ),
    "no sidecar": (lambda prefix: os.unlink(f"{prefix}.json"), ["a.json: file not found"]),
    "counts": (
        change_sidecar(documents=4, tokens=9),
        ["a.idx: contains 3 documents and 6 tokens, but its sidecar lists 4 and 9"],
    ),
    "a vocabulary too large for 16 bits": (
        change_sidecar(tokenizer=OTHER),
        ["70,000 ids, but a.idx stores them as uint16 (at most 65,535)"],
    ),
    "eod outside": (
        change_sidecar(eod_id=-1),
        ["eod_id is -1, expected an id from 0 to 999", "3 documents without the end-of-document id -1"],
    ),
    "bits after the end": (set_bits(0, 0xFF), ["has bits set after its 6 tokens", "a.words: checksum"]),
    "a document without a word": (set_bits(0, 0b110111), ["no word starts at token 3", "a.words: checksum"]),
    "bitmap too long": (write("words", b"ab"), ["a.words: got 2 bytes, expected 1", "a.words: checksum"]),
    "no bitmap": (lambda prefix: os.unlink(f"{prefix}.words"), ["a.words: file not found, but a.json"]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage(tmp_path, capsys, name):
    change, expected = DAMAGE[name]
    prefix = make_dataset(tmp_path / "a", [[9, 8, EOD], [EOD], [7, EOD]], segmenter="jieba")
    assert problems(prefix) == []
    change(Path(prefix))
    found = problems(prefix)
    for part in expected:
        assert any(part in problem for problem in found), (part, found)
    assert len(found) == len(expected), found
    good = make_dataset(tmp_path / "good", [[EOD]])
    assert cli.main(["dataset", "verify", prefix, good]) == 1
    output = capsys.readouterr()
    assert output.out.splitlines()[: len(found)] == [f"problem: {problem}" for problem in found]
    assert_facts(output.out.splitlines()[-2], "1 of 2 datasets")
    assert "error" not in output.err


def test_all_problems_at_once(tmp_path):
    prefix = make_dataset(tmp_path / "a", [[9, 8, EOD], [EOD], [7, EOD]], segmenter="jieba")
    patch_tokens(0, 2000)(Path(prefix))
    patch_tokens(1, EOD)(Path(prefix))
    patch_tokens(5, 1)(Path(prefix))
    set_bits(0, 0)(Path(prefix))
    change_sidecar(documents=7)(Path(prefix))
    assert len(problems(prefix)) == 7


def test_tokens_without_ends(tmp_path):
    prefix = make_dataset(tmp_path / "a", [[9, EOD, 8], [7]], append_eod=False)
    assert problems(prefix) == []


@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=80)
@given(
    documents=st.lists(st.lists(st.sampled_from([EOD, 5, 6]), max_size=30), max_size=9),
    cut=st.randoms(use_true_random=False),
)
def test_ends_against_the_definition(tmp_path_factory, documents, cut):
    """Documents of any number of sequences, including empty ones, with and without ends, across block boundaries."""
    prefix = tmp_path_factory.mktemp("a") / "a"
    make_dataset(prefix, [[EOD]], checksums=(), documents=len(documents), tokens=sum(map(len, documents)), shard="1/1")
    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        points = sorted(cut.choices(range(len(document) + 1), k=cut.randrange(3)))
        lengths = [stop - start for start, stop in zip([0, *points], [*points, len(document)], strict=True)]
        builder.add_document(np.array(document, dtype=np.uint16), lengths)
    builder.finalize(f"{prefix}.idx")
    found = problems(str(prefix), workers=2)
    expected = []
    without = [number for number, document in enumerate(documents) if not document or document[-1] != EOD]
    if any(documents) and without:
        count = plural(len(without), "document")
        expected.append(f"{count} without the end-of-document id 3 at the end, first document {without[0]:,} ")
    starts = np.cumsum([0, *map(len, documents)])
    inside = [
        int(start) + place
        for start, document in zip(starts, documents, strict=False)
        for place in range(len(document) - 1)
        if document[place] == EOD
    ]
    if inside:
        expected.append(f"occurs {len(inside):,} times inside documents, first at token {inside[0]:,} ")
    assert len(found) == len(expected), found
    for problem, part in zip(found, expected, strict=True):
        assert part in problem


def test_tokenizer_and_options(tmp_path, tiny, capsys):
    prefix = make_dataset(tmp_path / "a", random_documents(4, seed=1))
    found = problems(prefix, tokenizer=tiny.tokenizer)
    assert [problem.split(": ")[1].split(" is ")[0] for problem in found] == [
        "tokenizer.fingerprint",
        "tokenizer.vocab_size",
        "eod_id",
    ]
    assert_facts(found[2], "a.json", "eod_id is 3", tiny.tokenizer)
    assert problems(str(tiny.directory / "en"), tokenizer=tiny.tokenizer) == []
    with user_error("none: tokenizer not found"):
        problems(prefix, tokenizer="none")
    for arguments, fact in ((["--input"], "--input is empty"), (["--input", prefix, "--workers", "0"], "workers is 0")):
        status = cli.main(["dataset", "verify", *arguments])
        assert_refused(status, capsys.readouterr().err, fact)
    write_tokens(tmp_path / "plain", [[1]])
    (problem,) = problems(str(tmp_path / "plain"))
    assert_facts(problem, f"{tmp_path}/plain.json: file not found", "preprocess", "dataset repair")


def test_training_rejects_wrapped_ids(tmp_path):
    prefix = make_dataset(tmp_path / "a", random_documents(4, seed=1), tokenizer=OTHER)
    source = DataSource(path=prefix, language="zh")
    data = DataSection(tokenizer="x", sources=[source], seq_length=8)
    for check in (lambda: open_training_sources(data, ["zh"]), lambda: _check_source(source)):
        with user_error(f"{prefix}.json", "70,000 ids", "a.idx", "uint16", "65,535"):
            check()
    make_dataset(tmp_path / "a", random_documents(4, seed=1), documents=5)
    with user_error(f"{prefix}.idx", "4 documents", "sidecar lists 5"):
        _check_source(source)
