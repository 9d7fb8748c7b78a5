"""The manifest of a checkpoint: size and checksum of every file in it. Written last, so that a directory with a
manifest was complete once, and read first, so that damage is found before anything is loaded."""

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from megatron_prealign.errors import UserError
from megatron_prealign.files.checksum import Checksum, file_checksum
from megatron_prealign.files.sync import sync_file

MANIFEST = "manifest.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """What a file was when it was written."""

    bytes: int
    """Its size."""
    checksum: str
    """`checksum.file_checksum` of it."""


class HashedFile(io.RawIOBase):
    """A file that is written from its beginning to its end and hashed on the way: reading it again for its record would
    cost as much as writing it."""

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
        """Waits until the content is on the disk; returns the record of what was written so far."""
        os.fsync(self._file.fileno())
        return FileRecord(self._bytes, self._checksum.hexdigest())

    def close(self) -> None:
        self._file.close()
        super().close()


class ManifestError(ValueError):
    """A manifest is missing or damaged; the text says how."""


def record_file(path: Path) -> FileRecord:
    """Reads a file and returns its record.

    Raises:
        UserError: it cannot be read.
    """
    checksum = file_checksum(path)
    return FileRecord(path.stat().st_size, checksum)


def list_files(directory: Path) -> list[str]:
    """Every file below `directory` but the manifest, as paths relative to it with `/`, sorted."""
    found = []
    for parent, _, names in os.walk(directory):
        base = Path(parent).relative_to(directory)
        found += [(base / name).as_posix() for name in names]
    return sorted(name for name in found if name != MANIFEST)


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Writes and syncs the manifest of `directory`.

    Args:
        records: Path relative to the directory -> record; files of the directory that are not there are read for
            theirs. All of them go into the manifest: a network disk may list a file later than its writer knew of it.

    Raises:
        OSError: it cannot be written.
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
        ManifestError: there is none, or it is damaged.
    """
    file = directory / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if content["format_version"] != _FORMAT_VERSION:
            raise ManifestError(
                f"{MANIFEST} has format_version {content['format_version']}, expected {_FORMAT_VERSION}"
            )
        records = {name: FileRecord(**facts) for name, facts in content["files"].items()}
        for name, record in records.items():
            path = PurePosixPath(name)
            inside = not path.is_absolute() and ".." not in path.parts
            if not (inside and type(record.bytes) is int and record.bytes >= 0 and isinstance(record.checksum, str)):
                raise ManifestError(f"{MANIFEST} is damaged (entry {name!r})")
    except FileNotFoundError as error:
        raise ManifestError(f"{MANIFEST} is missing: the checkpoint was never completed") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(f"{MANIFEST} is damaged ({error})") from error
    return records


def find_problems(directory: Path, *, checksums: bool = False) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each; empty when all is well.

    Args:
        checksums: Read the files; otherwise only their sizes are compared.
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
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """What is wrong with the files of a checkpoint, a line each; empty when all is well.

    Args:
        records: What `read_manifest` gave.
        checksums: Read the files too; otherwise only their sizes are compared.
        names: Files to look at; None for all. Ranks share them out.
        progress: Told the bytes as they are read.
    """
    problems = []
    for name in sorted(records) if names is None else names:
        record, path = records[name], directory / name
        try:
            size = path.stat().st_size
            if size != record.bytes:
                problems.append(f"{name} has {size:,} bytes, expected {record.bytes:,}")
            elif checksums and file_checksum(path, progress=progress) != record.checksum:
                problems.append(f"{name} has another checksum than when it was written")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
        except UserError as error:
            problems.append(str(error).removeprefix(f"{directory}/"))
    return problems
