"""Writing datasets: the index file, checksums and atomically written groups of files."""

import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from support.messages import user_error
from support.sidecars import save_sidecar

from megatron_prealign.data import indexed
from megatron_prealign.data.indexed import check_indexed, import_indexed_dataset, index_bytes, write_index
from megatron_prealign.data.sidecar import Sidecar, TokenizerRecord, load_sidecar
from megatron_prealign.files import atomic, checksum, sync
from megatron_prealign.files.atomic import write_all_atomically, write_atomically
from megatron_prealign.files.checksum import Checksum, file_checksum


def reference_index(directory: Path, dtype: type, documents: list[list[int]]) -> bytes:
    """Index written by Megatron-Core's builder for documents with these sequence lengths."""
    builder = import_indexed_dataset().IndexedDatasetBuilder(str(directory / "reference.bin"), dtype=dtype)
    for lengths in documents:
        builder.add_document(np.zeros(sum(lengths), dtype=dtype), lengths)
    builder.finalize(str(directory / "reference.idx"))
    return (directory / "reference.idx").read_bytes()


@settings(max_examples=60)
@given(
    documents=st.lists(st.lists(st.integers(0, 30), max_size=4), max_size=20),
    dtype=st.sampled_from([np.uint16, np.int32, np.uint8, np.int64]),
    chunk=st.integers(1, 7),
)
def test_write_index_equals_megatron_core(tmp_path_factory, documents, dtype, chunk):
    directory = tmp_path_factory.mktemp("index")
    lengths = np.array([length for document in documents for length in document], dtype=np.int32)
    boundaries = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "_INDEX_CHUNK", chunk)
        write_index(directory / "actual.idx", dtype, lengths, boundaries)
    assert (directory / "actual.idx").read_bytes() == reference_index(directory, dtype, documents)
    assert (directory / "actual.idx").stat().st_size == index_bytes(len(lengths), len(boundaries))


def test_every_sequence_a_document(tmp_path):
    lengths = np.array([3, 0, 70_000], dtype=np.int32)
    write_index(tmp_path / "actual.idx", np.uint16, lengths)
    assert (tmp_path / "actual.idx").read_bytes() == reference_index(tmp_path, np.uint16, [[3], [0], [70_000]])


def test_pointers_beyond_32_bits(tmp_path):
    write_index(tmp_path / "actual.idx", np.int32, np.full(3, 2**31 - 1, dtype=np.int32))
    assert struct.unpack_from("<3q", (tmp_path / "actual.idx").read_bytes(), 34 + 12) == (0, 2**33 - 4, 2**34 - 8)


@pytest.mark.parametrize("sequences", [2**31 - 1, 2**31, 2**31 + 5, 2**32, 2**32 + 1, 10**12])
def test_sizes_of_huge_indexes(sequences):
    assert index_bytes(sequences, sequences + 1) == 34 + 20 * sequences + 8


@pytest.mark.parametrize("boundaries", [[], [1, 2], [0, 3], [0]])
def test_invalid_boundaries(tmp_path, boundaries):
    with pytest.raises(ValueError, match="document boundaries .* 0 to 2"):
        write_index(tmp_path / "a.idx", np.uint16, np.ones(2, np.int32), np.array(boundaries, dtype=np.int64))
    with pytest.raises(ValueError, match="dtype complex64"):
        write_index(tmp_path / "a.idx", np.complex64, np.ones(2, np.int32))
    assert not (tmp_path / "a.idx").exists()


def definition(data: bytes, block: int) -> str:
    """The checksum by its definition."""
    digests = [xxhash.xxh3_64(data[start : start + block]).digest() for start in range(0, len(data), block)]
    return "xxh3:" + xxhash.xxh3_128(b"".join(digests)).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 20, 99])
@pytest.mark.parametrize("piece", [1, 7, 10, 50])
def test_checksum(tmp_path, monkeypatch, size, piece):
    monkeypatch.setattr(checksum, "CHECKSUM_BLOCK", 10)
    monkeypatch.setattr(checksum, "_READ_BYTES", 4)
    data = np.random.default_rng(size).bytes(size)
    stream = Checksum()
    for start in range(0, size, piece):
        assert stream.hexdigest() == definition(data[:start], 10)
        stream.update(data[start : start + piece])
    stream.update(np.empty(0, np.int32).data)
    assert stream.hexdigest() == definition(data, 10)
    (tmp_path / "file").write_bytes(data)
    reported: list[int] = []
    for workers in (1, 3):
        assert file_checksum(tmp_path / "file", workers, reported.append) == definition(data, 10)
    assert sum(reported) == 2 * size


def test_checksum_of_arrays_and_its_real_block():
    array = np.arange(100, dtype=np.int32).reshape(10, 10)
    stream = Checksum()
    stream.update(array.data)
    assert stream.hexdigest() == definition(array.tobytes(), 64 * 2**20)
    assert checksum.CHECKSUM_BLOCK == 64 * 2**20


def test_checksum_of_a_missing_file(tmp_path):
    with user_error(f"cannot read {tmp_path / 'file'}", "No such file or directory"):
        file_checksum(tmp_path / "file")
    with user_error(f"cannot read {tmp_path} at byte 0", "Is a directory"):
        file_checksum(tmp_path)


def make_sidecar() -> Sidecar:
    return Sidecar(
        language="de", tokenizer=TokenizerRecord("tok", "sha256:00", 70), eod_id=0, documents=3, tokens=8, bytes=11
    )


def test_sidecar_fields_of_preprocessing(tmp_path):
    later = {"checksums": {"bin": "xxh3:0"}, "engine": "tokenizers", "text_keys": ["data.text"], "shard": "3/8"}
    save_sidecar(Sidecar(**{**vars(make_sidecar()), **later}), tmp_path / "a")
    loaded = load_sidecar(tmp_path / "a")
    assert {name: getattr(loaded, name) for name in later} == later
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["format_version"] == 1
    for name in later:
        (tmp_path / "a.json").write_text(json.dumps({key: value for key, value in data.items() if key != name}))
        with user_error(tmp_path / "a.json", f"field '{name}' is missing"):
            load_sidecar(tmp_path / "a")
    for name, value in [("checksums", ["x"]), ("checksums", {"bin": 1}), ("text_keys", [1]), ("shard", 3)]:
        (tmp_path / "a.json").write_text(json.dumps({**data, name: value}))
        with user_error(tmp_path / "a.json", f"field '{name}' is {value!r}"):
            load_sidecar(tmp_path / "a")


def test_content_is_synced_before_renames(tmp_path, monkeypatch):
    events = []
    for module in (sync, atomic):
        monkeypatch.setattr(module, "sync_directory", lambda path: events.append(("directory", path.name)))
    monkeypatch.setattr(sync, "sync_file", lambda path: events.append(("sync", path.name.split(".")[1])))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(("rename", new.name)), replace(old, new)))
    with write_all_atomically([tmp_path / "one", tmp_path / "two"]) as temporaries:
        for path in temporaries:
            path.write_text("x")
    assert [event for event in events if event[0] != "directory"] == [
        ("sync", "one"),
        ("sync", "two"),
        ("rename", "one"),
        ("rename", "two"),
    ]
    assert events[-1] == ("directory", tmp_path.name)
    events.clear()
    with write_atomically(tmp_path / "new") as directory:
        (directory / "deep").mkdir(parents=True)
        (directory / "deep" / ".x.y").write_text("x")
    assert ("sync", "x") in events and ("directory", "deep") in events


def test_a_killed_writer_never_leaves_a_mixed_group(tmp_path):
    """After a kill between the renames the last file is missing, so the group is incomplete."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from megatron_prealign.files.atomic import write_all_atomically\n"
        "replace = os.replace\n"
        "def once(old, new):\n"
        "    replace(old, new)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.replace = once\n"
        "with write_all_atomically([Path(sys.argv[1], name) for name in ('first', 'last')]) as paths:\n"
        "    for path in paths: path.write_text('new')\n"
    )
    for name in ("first", "last"):
        (tmp_path / name).write_text("old")
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=60).returncode == -signal.SIGKILL
    assert (tmp_path / "first").read_text() == "new"
    assert not (tmp_path / "last").exists()


def test_written_index_opens(tmp_path):
    np.arange(6, dtype=np.uint16).tofile(tmp_path / "a.bin")
    write_index(tmp_path / "a.idx", np.uint16, np.array([4, 2], np.int32))
    check_indexed(tmp_path / "a")
