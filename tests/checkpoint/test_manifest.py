"""The manifest of a checkpoint: every corrupt file is found and reported."""

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.messages import user_error

from megatron_prealign.checkpoint.manifest import (
    MANIFEST,
    FileRecord,
    ManifestError,
    find_damage,
    read_manifest,
    record_file,
    write_manifest,
)
from megatron_prealign.files import checksum
from megatron_prealign.files.checksum import file_checksum

# Verifies a checkpoint; Ctrl-C is pressed at the first read.
INTERRUPTED = """
import os, signal, sys
from megatron_prealign.cli import main
pread = os.pread
def interrupted(*arguments):
    os.pread = pread
    os.kill(os.getpid(), signal.SIGINT)
    return pread(*arguments)
os.pread = interrupted
sys.argv[1:] = ["checkpoint", "verify", sys.argv[1]]
sys.exit(main())
"""


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


def test_corrupt_files_are_reported(directory: Path) -> None:
    records = read_manifest(directory)
    content = bytearray((directory / "weights").read_bytes())
    content[1000] ^= 1
    (directory / "weights").write_bytes(content)
    assert find_damage(directory, records, checksums=False) == []
    assert find_damage(directory, records, checksums=True) == ["weights does not match its checksum"]
    assert find_damage(directory, records, checksums=True, names=["empty"]) == []
    (directory / "weights").write_bytes(content[:-1])
    (directory / "empty").unlink()
    assert find_damage(directory, records, checksums=True) == [
        "empty is missing",
        "weights has 2,559 bytes, expected 2,560",
    ]


def test_an_interrupt_ends_the_threads(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "_READ_BYTES", 100)
    records, ending, reads = read_manifest(directory), threading.Event(), []
    shutdown = ThreadPoolExecutor.shutdown

    def observed(pool: ThreadPoolExecutor, **options: bool) -> None:
        ending.set()
        shutdown(pool, **options)

    def interrupt(amount: int) -> None:
        reads.append(amount)
        if len(reads) == 1:
            os.kill(os.getpid(), signal.SIGINT)
            # The main thread has been interrupted and waits for this one.
            assert ending.wait(20)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", observed)
    with pytest.raises(KeyboardInterrupt):
        find_damage(directory, records, checksums=True, progress=interrupt)
    assert reads == [100]


def test_ctrl_c_ends_the_command_with_one_line(directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(directory)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (130, "")
    # The line of the progress comes first.
    assert done.stderr.splitlines()[-1].startswith("interrupted") and "Traceback" not in done.stderr


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
def test_a_corrupt_manifest_is_a_manifest_error(directory: Path, content: bytes) -> None:
    (directory / MANIFEST).write_bytes(content)
    with user_error(MANIFEST, kind=ManifestError):
        read_manifest(directory)


def test_a_directory_without_manifest_was_never_complete(tmp_path: Path) -> None:
    with user_error(f"{MANIFEST} is missing", kind=ManifestError):
        read_manifest(tmp_path)


def test_files_without_a_record_are_read(directory: Path) -> None:
    """A record that is passed is used unchanged."""
    write_manifest(directory, {"weights": FileRecord(1, "xxh3:0")})
    files = json.loads((directory / MANIFEST).read_bytes())["files"]
    assert files["weights"] == {"bytes": 1, "checksum": "xxh3:0"}
    assert files["empty"]["checksum"] == file_checksum(directory / "empty")


def test_recorded_files_are_expected_even_if_not_listed(directory: Path) -> None:
    """Another process wrote the file and the listing of a network file system is outdated, or it was lost."""
    write_manifest(directory, {"later": FileRecord(1, "xxh3:0")})
    records = read_manifest(directory)
    assert list(records) == ["empty", "later", "tokenizer/vocab.json", "weights"]
    assert find_damage(directory, records, checksums=False) == ["later is missing"]
