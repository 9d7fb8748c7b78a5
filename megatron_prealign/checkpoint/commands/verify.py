"""Reads checkpoints whole and compares every file with the manifest."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from megatron_prealign.checkpoint.commands.list import checkpoint_directories
from megatron_prealign.checkpoint.directory import (
    LATEST,
    is_complete,
    named_latest,
    resolve_checkpoint,
    step_directories,
)
from megatron_prealign.checkpoint.manifest import MANIFEST, ManifestError, find_damage, list_files, read_manifest
from megatron_prealign.checkpoint.state import STATE, read_state
from megatron_prealign.errors import UserError


@dataclass(frozen=True)
class VerifyResult:
    """What reading a checkpoint found."""

    directory: Path
    problems: list[str]
    """A line for each damaged file; empty if all is well."""
    unknown: list[str]
    """Files that the manifest does not know; they do no harm."""
    files: int
    bytes: int
    """Of the files that were compared."""


def checkpoints_to_verify(path: Path, everything: bool) -> list[Path]:
    """The newest checkpoint at `path`, or all that were not put aside. The newest is what `latest` names, where that is
    there, complete or not.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).exists() or (path / STATE).exists():
        return [path]
    if not everything:
        named = _named_at(path)
        if named is not None and named.is_dir():
            return [named]
        if named is not None and not any(is_complete(each) for each in step_directories(named.parent)):
            return []
        return [resolve_checkpoint(path)]
    found = [
        each for each in checkpoint_directories(path) if not each.name.startswith(".") and ".damaged" not in each.name
    ]
    if not found:
        raise UserError(f"{path} holds no checkpoint but unfinished and damaged ones")
    return found


def find_lost(path: Path) -> str | None:
    """What is said of a directory that `latest` at `path` names and that is not there; None if all is well."""
    named = _named_at(path)
    if named is None or named.is_dir():
        return None
    return f"{named.parent / LATEST} names {named.name}, which is missing"


def _named_at(path: Path) -> Path | None:
    found = (named_latest(directory) for directory in (path, path / "checkpoints"))
    return next((named for named in found if named is not None), None)


def bytes_to_read(directories: Sequence[Path]) -> int:
    """What `verify_checkpoint` will tell its progress in all, if nothing is damaged."""
    total = 0
    for directory in directories:
        try:
            total += sum(record.bytes for record in read_manifest(directory).values())
        except ManifestError:
            continue
    return total


def verify_checkpoint(directory: Path, *, workers: int, progress: Callable[[int], None] | None = None) -> VerifyResult:
    """Reads every file of a checkpoint.

    Args:
        directory: The checkpoint.
        workers: Files read at the same time; reading and hashing let go of Python's lock.
        progress: Told the bytes as they are read, by one thread at a time.
    """
    try:
        records = read_manifest(directory)
    except ManifestError as error:
        return VerifyResult(directory, [str(error)], [], 0, 0)
    lock = Lock()

    def count(amount: int) -> None:
        if progress is not None:
            with lock:
                progress(amount)

    def look_at(name: str) -> list[str]:
        return find_damage(directory, records, checksums=True, names=[name], progress=count)

    # The largest first, so that no thread is left alone with one at the end.
    names = sorted(records, key=lambda name: -records[name].bytes)
    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip(names, pool.map(look_at, names), strict=True))
    problems = [problem for name in sorted(records) for problem in found[name]]
    problems += _unreadable_state(directory, problems)
    unknown = [name for name in list_files(directory) if name not in records]
    return VerifyResult(directory, problems, unknown, len(records), sum(record.bytes for record in records.values()))


def _unreadable_state(directory: Path, problems: Sequence[str]) -> list[str]:
    """A file that is as it was written and still says nothing: written by something else."""
    if any(problem.startswith(STATE) for problem in problems):
        return []
    try:
        read_state(directory)
    except UserError as error:
        return [str(error).removeprefix(f"{directory}/").split(";")[0]]
    return []
