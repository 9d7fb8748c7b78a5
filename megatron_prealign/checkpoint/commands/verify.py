"""Reads all files of checkpoints and compares them with their manifests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.checkpoint.commands.list import checkpoint_directories
from megatron_prealign.checkpoint.directory import (
    DAMAGED,
    LATEST,
    is_complete,
    latest_problem,
    named_latest,
    resolve_checkpoint,
    step_directories,
)
from megatron_prealign.checkpoint.manifest import MANIFEST, ManifestError, find_damage, list_files, read_manifest
from megatron_prealign.checkpoint.state import STATE, read_state
from megatron_prealign.errors import UserError


@dataclass(frozen=True)
class VerifyResult:
    """Result of verifying a checkpoint."""

    directory: Path
    problems: list[str]
    """One line for each corrupt file; empty if the checkpoint is intact."""
    unknown: list[str]
    """Files that are not in the manifest; they are harmless."""
    files: int
    """Number of files in the manifest."""
    bytes: int
    """Size of these files in bytes."""


def checkpoints_to_verify(path: Path, everything: bool) -> list[Path]:
    """Returns the checkpoint that `latest` names at `path` if it exists, complete or not, else the newest one.

    Args:
        everything: Return all checkpoints instead, except unfinished ones and those renamed to `.damaged`.

    Raises:
        UserError: there is no checkpoint.
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
    checkpoints = [
        each for each in checkpoint_directories(path) if not each.name.startswith(".") and DAMAGED not in each.name
    ]
    if not checkpoints:
        raise UserError(f"{path} contains only incomplete and damaged checkpoints")
    return checkpoints


def find_latest_damage(path: Path) -> str | None:
    """Problem of `latest` at `path` if it exists and does not name an existing directory, else None."""
    for directory in (path, path / "checkpoints"):
        if (directory / LATEST).exists():
            named = named_latest(directory)
            if named is None or not named.is_dir():
                return f"{directory / LATEST} {latest_problem(directory)}"
    return None


def _named_at(path: Path) -> Path | None:
    pointers = (named_latest(directory) for directory in (path, path / "checkpoints"))
    return next((named for named in pointers if named is not None), None)


def bytes_to_read(directories: Sequence[Path]) -> int:
    """Total bytes that `verify_checkpoint` will report as progress if nothing is corrupt."""
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
        directory: Checkpoint directory.
        workers: Number of files read in parallel; reading and hashing release the GIL.
        progress: Called with the number of bytes of each read, from one thread at a time.
    """
    try:
        records = read_manifest(directory)
    except ManifestError as error:
        return VerifyResult(directory, [str(error)], [], 0, 0)
    problems = find_damage(directory, records, checksums=True, workers=workers, progress=progress)
    problems += _unreadable_state(directory, problems)
    unknown = [name for name in list_files(directory) if name not in records]
    return VerifyResult(directory, problems, unknown, len(records), sum(record.bytes for record in records.values()))


def _unreadable_state(directory: Path, problems: Sequence[str]) -> list[str]:
    """Problem of a `state.json` that matches its checksum and is still invalid."""
    if any(problem.startswith((STATE, f"cannot read {STATE}")) for problem in problems):
        return []
    try:
        read_state(directory)
    except UserError as error:
        return [str(error).removeprefix(f"{directory}/").split(";")[0]]
    return []
