"""The manifest of a checkpoint: every damage of a file is found and named."""

import json
from pathlib import Path

import pytest

from megatron_prealign.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    ManifestError,
    find_damage,
    read_manifest,
    record_file,
    write_manifest,
)
from megatron_prealign.files.checksum import file_checksum


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").write_bytes(b"")
    write_manifest(tmp_path, {"weights": record_file(tmp_path / "weights")})
    return tmp_path


def test_every_file_is_recorded(directory: Path) -> None:
    records = read_manifest(directory)
    assert list(records) == ["empty", "tokenizer/vocab.json", "weights"]
    assert records["weights"] == FileRecord(2560, file_checksum(directory / "weights"))
    assert find_damage(directory, records, checksums=True) == []
    before = (directory / MANIFEST).read_bytes()
    write_manifest(directory, {})
    assert (directory / MANIFEST).read_bytes() == before


def test_damage_is_named(directory: Path) -> None:
    records = read_manifest(directory)
    content = bytearray((directory / "weights").read_bytes())
    content[1000] ^= 1
    (directory / "weights").write_bytes(content)
    assert find_damage(directory, records, checksums=False) == []
    assert find_damage(directory, records, checksums=True) == ["weights has another checksum than when it was written"]
    assert find_damage(directory, records, checksums=True, names=["empty"]) == []
    (directory / "weights").write_bytes(content[:-1])
    (directory / "empty").unlink()
    assert find_damage(directory, records, checksums=True) == [
        "empty is missing",
        "weights has 2,559 bytes, expected 2,560",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"format_version": 2, "files": {}}',
        b'{"format_version": 1}',
        b'{"format_version": 1, "files": {"a": {"bytes": "1", "checksum": ""}}}',
        b'{"format_version": 1, "files": {"a": {"bytes": 1}}}',
        b'{"format_version": 1, "files": {"../a": {"bytes": 1, "checksum": ""}}}',
        b'{"format_version": 1, "files": {"/a": {"bytes": 1, "checksum": ""}}}',
        b'{"format_version": 1, "files": [1]}',
    ],
)
def test_a_damaged_manifest_is_one_kind_of_error(directory: Path, content: bytes) -> None:
    (directory / MANIFEST).write_bytes(content)
    with pytest.raises(ManifestError, match=MANIFEST):
        read_manifest(directory)


def test_a_directory_without_manifest_was_never_complete(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="never completed"):
        read_manifest(tmp_path)


def test_what_was_not_recorded_is_read(directory: Path) -> None:
    """A record that is given is taken as it is: whoever wrote the file knows it."""
    write_manifest(directory, {"weights": FileRecord(1, "xxh3:0")})
    files = json.loads((directory / MANIFEST).read_bytes())["files"]
    assert files["weights"] == {"bytes": 1, "checksum": "xxh3:0"}
    assert files["empty"]["checksum"] == file_checksum(directory / "empty")


def test_what_was_recorded_is_looked_for_though_it_is_not_listed(directory: Path) -> None:
    """Another process wrote it, and the listing of a network disk is older, or it is gone."""
    write_manifest(directory, {"later": FileRecord(1, "xxh3:0")})
    records = read_manifest(directory)
    assert list(records) == ["empty", "later", "tokenizer/vocab.json", "weights"]
    assert find_damage(directory, records, checksums=False) == ["later is missing"]
