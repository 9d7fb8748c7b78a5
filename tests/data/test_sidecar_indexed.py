"""The sidecar and the checks of .bin/.idx: round trips, and one-line errors for invalid files."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from support.messages import user_error
from support.sidecars import save_sidecar

from megatron_prealign.corpus.readers import Problem
from megatron_prealign.data import indexed
from megatron_prealign.data.indexed import check_indexed, import_indexed_dataset, open_indexed, token_dtype
from megatron_prealign.data.sidecar import InputRecord, Sidecar, TokenizerRecord, load_sidecar
from megatron_prealign.files.atomic import write_all_atomically, write_atomically

DOCUMENTS = [[5, 6, 7, 0], [0], [65000, 1, 0]]


@pytest.fixture
def sidecar() -> Sidecar:
    return Sidecar(
        language="de",
        tokenizer=TokenizerRecord("tok", "sha256:00", 70),
        eod_id=0,
        documents=3,
        tokens=8,
        bytes=11,
        skipped=[Problem("a.txt:3", "empty document")],
        skipped_count=1,
        inputs=[InputRecord("a.txt", 20)],
    )


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    path = tmp_path / "de.v1"
    builder = import_indexed_dataset().IndexedDatasetBuilder(f"{path}.bin", dtype=numpy.uint16)
    for document in DOCUMENTS:
        builder.add_document(numpy.array(document), [len(document)])
    builder.finalize(f"{path}.idx")
    return path


def test_sidecar_round_trip(tmp_path: Path, sidecar: Sidecar) -> None:
    save_sidecar(sidecar, tmp_path / "de.v1")
    assert load_sidecar(tmp_path / "de.v1") == sidecar
    data = json.loads((tmp_path / "de.v1.json").read_text())
    assert (data["format_version"], data["append_eod"], data["bos"]) == (1, True, False)
    assert [path.name for path in tmp_path.iterdir()] == ["de.v1.json"]


def test_segmenter_in_the_sidecar(tmp_path: Path, sidecar: Sidecar) -> None:
    named = replace(sidecar, segmenter="jieba")
    save_sidecar(named, tmp_path / "zh")
    assert load_sidecar(tmp_path / "zh") == named
    data = json.loads((tmp_path / "zh.json").read_text())
    assert data.pop("segmenter") == "jieba"
    (tmp_path / "zh.json").write_text(json.dumps({**data, "segmenter": None}))
    assert load_sidecar(tmp_path / "zh") == sidecar
    assert sidecar.segmenter is None


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"tokens": "8"}, "'tokens' is '8', expected int"),
        ({"documents": True}, "'documents' is True, expected int"),
        ({"language": None}, "'language' is None, expected str"),
        ({"tokenizer": {"path": "x"}}, "tokenizer: field 'fingerprint' is missing"),
        ({"tokenizer": "x"}, "'tokenizer' is 'x'"),
        ({"skipped": ["x"]}, "skipped: 'x' is not a JSON object"),
        ({"segmenter": 1}, "'segmenter' is 1, expected str"),
        ({"eod_id": ...}, "'eod_id' is missing"),
    ],
)
def test_invalid_sidecars(tmp_path: Path, sidecar: Sidecar, change: dict[str, object], fact: str) -> None:
    save_sidecar(sidecar, tmp_path / "a")
    data = {**json.loads((tmp_path / "a.json").read_text()), **change}
    data = {key: value for key, value in data.items() if value is not ...}
    (tmp_path / "a.json").write_text(json.dumps(data))
    with user_error(tmp_path / "a.json", fact):
        load_sidecar(tmp_path / "a")


def test_unreadable_sidecars(tmp_path: Path) -> None:
    with user_error(f"{tmp_path / 'a.json'}: file not found", "preprocess", "dataset repair"):
        load_sidecar(tmp_path / "a")
    for content, fact in ((b"{", "JSON file"), (b"\xff", "JSON file"), (b"[]", "JSON object")):
        (tmp_path / "a.json").write_bytes(content)
        with user_error(tmp_path / "a.json", fact):
            load_sidecar(tmp_path / "a")


def test_open_indexed(prefix: Path) -> None:
    dataset = open_indexed(prefix)
    assert [tokens.tolist() for tokens in dataset] == DOCUMENTS
    assert dataset.index.dtype == numpy.uint16


def test_missing_files(prefix: Path) -> None:
    with user_error("de.v1.bin.idx: file not found", "prefix without extension"):
        open_indexed(f"{prefix}.bin")
    Path(f"{prefix}.bin").unlink()
    with user_error("de.v1.bin: file not found", "preprocess"):
        open_indexed(prefix)


def test_truncated_or_mismatched_files(prefix: Path) -> None:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    good_index, good_tokens = index.read_bytes(), tokens.read_bytes()
    for size in range(len(good_index)):
        index.write_bytes(good_index[:size])
        with user_error("de.v1.idx: "):
            check_indexed(prefix)
    index.write_bytes(good_index)
    for data in (good_tokens[:-1], good_tokens[:-2], good_tokens + b"\0\0", b""):
        tokens.write_bytes(data)
        with user_error(f"de.v1.bin: got {len(data)} bytes, expected {len(good_tokens)}"):
            check_indexed(prefix)


@pytest.mark.parametrize(
    ("offset", "form", "value", "pattern"),
    [
        (0, "<B", 0x50, "not a Megatron index file"),
        (9, "<Q", 2, "version 2"),
        (17, "<B", 9, "dtype code 9"),
        (17, "<B", 4, "expected 32 from|do not match"),
        (18, "<Q", 4, "bytes, expected"),
        (34, "<i", -4, "negative length"),
        (38, "<i", 2, "lengths and offsets"),
        (46, "<q", 2, "first document not at offset 0"),
        (46 + 24 + 24, "<q", 2, "document boundaries .* 3 sequences"),
        (46 + 24 + 8, "<q", 3, "document boundaries decrease"),
        (46 + 24 + 16, "<q", -1, "document boundaries decrease"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_corrupt_index(
    prefix: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, offset: int, form: str, value: int, pattern: str
) -> None:
    monkeypatch.setattr(indexed, "_INDEX_CHUNK", chunk)
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    struct.pack_into(form, data, offset, value)
    Path(f"{prefix}.idx").write_bytes(data)
    with user_error("de.v1.") as caught:
        check_indexed(prefix)
    assert re.search(pattern, str(caught.value))


def test_token_dtype_matches_megatron_core() -> None:
    optimal = import_indexed_dataset().DType.optimal_dtype
    for size in (1, 65_499, 65_500, 65_501, 65_536, 200_000):
        assert token_dtype(size) is optimal(size)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_no_files_remain_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), write_all_atomically([tmp_path / "a", tmp_path / "b"]) as (first, second):
        first.write_text("new")
        second.mkdir()
        (second / "file").write_text("new")
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"
    with write_atomically(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1
