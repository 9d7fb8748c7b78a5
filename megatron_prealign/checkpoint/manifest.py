"""The manifest of a checkpoint: size and checksum of every file.

It is written last, so a directory with a manifest was complete at that time, and read first, so corruption is found
before anything is loaded.
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any, BinaryIO

from megatron_prealign.errors import UserError
from megatron_prealign.files.checksum import Checksum, file_checksum
from megatron_prealign.files.sync import sync_file
from megatron_prealign.files.threads import stoppable_threads

MANIFEST = "manifest.json"
IS_MISSING = "is missing"
"""End of the description of a problem: the file does not exist."""
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """Size and checksum of a file when it was written."""

    bytes: int
    """Size of the file."""
    checksum: str
    """`checksum.file_checksum` of the file."""


class HashedFile(io.RawIOBase):
    """File that is hashed while it is written sequentially; reading it again would cost as much as writing it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file: BinaryIO = path.open("wb", buffering=0)
        self._checksum = Checksum()
        self._bytes = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._checksum.update(view)
        size = len(view)
        while len(view):
            view = view[self._file.write(view) :]
        self._bytes += size
        return size

    def sync(self) -> FileRecord:
        """Flushes the content to disk; returns the record of what was written so far."""
        os.fsync(self._file.fileno())
        return FileRecord(self._bytes, self._checksum.hexdigest())

    def close(self) -> None:
        self._file.close()
        super().close()


class ManifestError(ValueError):
    """The manifest is missing or corrupt; the message says why."""


def record_file(path: Path) -> FileRecord:
    """Reads a file and returns its record.

    Raises:
        UserError: the file cannot be read.
    """
    checksum = file_checksum(path)
    return FileRecord(path.stat().st_size, checksum)


def list_files(directory: Path) -> list[str]:
    """Every file below `directory` except the manifest, as sorted relative paths with `/`."""
    paths = []
    for parent, _, names in os.walk(directory):
        base = Path(parent).relative_to(directory)
        paths += [(base / name).as_posix() for name in names]
    return sorted(path for path in paths if path != MANIFEST)


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Writes and syncs the manifest of `directory`.

    Args:
        records: Path relative to the directory -> record. Other files of the directory are read for their records.
            All records go into the manifest, listed or not: a network file system may list a file late.

    Raises:
        OSError: the manifest cannot be written.
        UserError: a file cannot be read.
    """
    complete = {
        **{name: record_file(directory / name) for name in list_files(directory) if name not in records},
        **records,
    }
    content = {
        "format_version": _FORMAT_VERSION,
        "files": {name: asdict(record) for name, record in sorted(complete.items())},
    }
    (directory / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
    sync_file(directory / MANIFEST)


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """Path relative to `directory` -> record of each file.

    Raises:
        ManifestError: the manifest is missing or corrupt.
    """
    file = directory / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if content["format_version"] != _FORMAT_VERSION:
            raise ManifestError(
                f"{MANIFEST} has format_version {content['format_version']}, expected {_FORMAT_VERSION}"
            )
        records = {name: FileRecord(**values) for name, values in content["files"].items()}
        for name, record in records.items():
            path = PurePosixPath(name)
            inside = not path.is_absolute() and ".." not in path.parts
            if not (inside and type(record.bytes) is int and record.bytes >= 0 and isinstance(record.checksum, str)):
                raise ManifestError(f"{MANIFEST} is corrupt (entry {name!r})")
    except FileNotFoundError as error:
        raise ManifestError(f"{MANIFEST} is missing: the save was interrupted") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{MANIFEST} is corrupt ({error})") from error
    return records


def find_problems(directory: Path, *, checksums: bool = False) -> list[str]:
    """Problems of the files of a checkpoint, one line each; empty if it is intact.

    Args:
        checksums: Read the files and compare checksums; otherwise compare only sizes.
    """
    try:
        return find_damage(directory, read_manifest(directory), checksums=checksums)
    except ManifestError as error:
        return [str(error)]


def find_damage(
    directory: Path,
    records: Mapping[str, FileRecord],
    *,
    checksums: bool,
    names: Iterable[str] | None = None,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Problems of the files of a checkpoint, one line each; empty if it is intact.

    Args:
        records: Result of `read_manifest`.
        checksums: Read the files and compare checksums; otherwise compare only sizes.
        names: Files to check; None for all.
        workers: Number of files read in parallel; reading and hashing release the GIL.
        progress: Called with the number of bytes of each read, from one thread at a time.
    """
    lock = Lock()
    names = list(records if names is None else names)
    # Largest first, so that no single thread is left with a large file at the end.
    names.sort(key=lambda name: (-records[name].bytes, name))
    with stoppable_threads(workers) as (pool, check):

        def count(amount: int) -> None:
            check()
            if progress is not None:
                with lock:
                    progress(amount)

        def problem_of(name: str) -> str | None:
            return _problem_of(directory, name, records[name], checksums, count)

        problems = dict(zip(names, pool.map(problem_of, names), strict=True))
    return [problem for name in sorted(names) if (problem := problems[name]) is not None]


def _problem_of(
    directory: Path, name: str, record: FileRecord, checksums: bool, progress: Callable[[int], None]
) -> str | None:
    path = directory / name
    try:
        size = path.stat().st_size
        if size != record.bytes:
            return f"{name} has {size:,} bytes, expected {record.bytes:,}"
        if checksums and file_checksum(path, progress=progress) != record.checksum:
            return f"{name} does not match its checksum"
    except FileNotFoundError:
        return f"{name} {IS_MISSING}"
    except OSError as error:
        return f"cannot read {name}: {error.strerror}"
    except UserError as error:
        return str(error).replace(f"{directory}/", "")
    return None
