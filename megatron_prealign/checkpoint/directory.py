"""Names and states of checkpoint directories. Imports no torch, so that recipes are validated without it."""

import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from megatron_prealign.checkpoint.manifest import MANIFEST
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.files.sync import sync_directory, sync_file
from megatron_prealign.runtime.log import warn_on_rank_zero

logger = logging.getLogger(__name__)

LATEST = "latest"
DAMAGED = ".damaged"
"""Suffix of the name of a corrupt checkpoint after it was renamed; nothing reads or removes it."""

_STEP = re.compile(r"step_(\d+)")
_MAX_LISTED = 10
_MAX_QUOTED = 40


def step_name(step: int) -> str:
    """Name of the directory of a checkpoint."""
    return f"step_{step:08d}"


def working_name(step: int) -> str:
    """Name of the directory until the checkpoint is complete."""
    return f".{step_name(step)}.incomplete"


def step_of(checkpoint: Path) -> int | None:
    """Step in the name of a directory; None if the directory is not named `step_NUMBER`."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a directory is a checkpoint whose save completed; its files may have been corrupted since."""
    return not checkpoint.name.startswith(".") and (checkpoint / MANIFEST).is_file()


def step_directories(directory: Path) -> list[Path]:
    """Directories in `directory` named `step_NUMBER`, complete or not, in ascending order of step."""
    if not directory.is_dir():
        return []
    steps = [(step, path) for path in directory.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps)]


def named_latest(directory: Path) -> Path | None:
    """Directory that `latest` names, which may not exist; None if the file is missing or does not name a step."""
    try:
        name = (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return directory / name if _STEP.fullmatch(name) else None


def latest_problem(directory: Path) -> str:
    """Why `latest` does not name an existing checkpoint; continues the path of the file in a message."""
    try:
        name = (directory / LATEST).read_bytes().decode("utf-8", errors="replace").strip()
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not _STEP.fullmatch(name):
        return f"contains {name[:_MAX_QUOTED]!r}, expected the name of a checkpoint such as {step_name(10)}"
    if not (directory / name).is_dir():
        return f"names {name}, which does not exist"
    return f"names {name}, which is not complete"


def point_latest(directory: Path, name: str) -> None:
    """Makes `latest` name a directory; if the process is killed, it has either the old name or the new one.

    Raises:
        OSError: the file cannot be written.
    """
    pointer = directory / f".{LATEST}.incomplete"
    pointer.write_text(name + "\n", encoding="utf-8")
    sync_file(pointer)
    os.replace(pointer, directory / LATEST)
    sync_directory(directory)


def latest_checkpoint(directory: Path) -> Path | None:
    """Returns the complete checkpoint that `latest` names in `directory`.

    Falls back, with a warning, to the complete checkpoint of the highest step; None if there is none.
    """
    named = named_latest(directory)
    if named is not None and is_complete(named):
        return named
    complete = [path for path in step_directories(directory) if is_complete(path)]
    if not complete:
        return None
    warn_on_rank_zero(
        logger,
        "%s %s; using the newest complete checkpoint %s",
        directory / LATEST,
        latest_problem(directory),
        complete[-1],
    )
    return complete[-1]


def resolve_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint at a path: a checkpoint, a directory of checkpoints or a run directory.

    Raises:
        UserError: no complete checkpoint was found, or it was renamed because it is corrupt.
    """
    path = Path(path)
    if DAMAGED in path.resolve().name:
        raise UserError(f"{path}: renamed by a run that found it corrupt; use another checkpoint")
    if is_complete(path):
        return path
    for directory in (path, path / "checkpoints"):
        newest = latest_checkpoint(directory)
        if newest is not None:
            return newest
    raise UserError(f"{path}: no complete checkpoint found{_explain_not_found(path)}")


def _explain_not_found(path: Path) -> str:
    """What a path without a complete checkpoint is, and what to do."""
    expected = f"; expected a step_* directory, a directory with `{LATEST}`, or a run directory"
    if not path.exists():
        return f", the path does not exist{expected}"
    if not path.is_dir():
        return f", it is a file{expected}"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors*")):
        return (
            ", it is a Hugging Face model directory; convert it with `megatron-prealign convert from-hf "
            f"--model {path} --output ...`"
        )
    steps = [path] if step_of(path) is not None else [*step_directories(path), *step_directories(path / "checkpoints")]
    if steps:
        names = shortened([each.name for each in steps], _MAX_LISTED)
        return f", {MANIFEST} is missing in {names}: the save was interrupted; use another checkpoint"
    inner = [each.name for each in sorted(path.iterdir()) if each.is_dir() and _contains_checkpoint(each)]
    if inner:
        return f", only in its subdirectories; use one of {shortened(inner, _MAX_LISTED)}"
    return expected


def _contains_checkpoint(path: Path) -> bool:
    steps = [*step_directories(path), *step_directories(path / "checkpoints")]
    return is_complete(path) or any(is_complete(each) for each in steps)


def directory_bytes(directory: Path) -> int:
    """Size of all files below a directory in bytes, except files that are removed meanwhile."""
    total = 0
    # Unlike rglob, os.walk skips directories that no longer exist.
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total
