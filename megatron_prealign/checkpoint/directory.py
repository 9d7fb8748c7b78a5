"""Where the checkpoints of a run lie and what they say about themselves. Imports no torch, so that a recipe is checked
without it."""

import logging
import os
import re
from pathlib import Path

from megatron_prealign.checkpoint.manifest import MANIFEST
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.files.sync import sync_directory, sync_file
from megatron_prealign.runtime.log import warn_once

logger = logging.getLogger(__name__)

LATEST = "latest"

_STEP = re.compile(r"step_(\d+)")
_MOST_NAMED = 10


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def working_name(step: int) -> str:
    """The directory's name until it is complete."""
    return f".{step_name(step)}.incomplete"


def step_of(checkpoint: Path) -> int | None:
    """The step by which a directory is named; None for directories that no run of ours wrote."""
    match = _STEP.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a directory is a checkpoint that was written to its end; its files may be damaged since."""
    return not checkpoint.name.startswith(".") and (checkpoint / MANIFEST).is_file()


def step_directories(directory: Path) -> list[Path]:
    """The directories in `directory` that are named as checkpoints are, complete or not, by rising step."""
    if not directory.is_dir():
        return []
    steps = [(step, path) for path in directory.iterdir() if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps)]


def named_latest(directory: Path) -> Path | None:
    """The directory that `latest` names, which need not be there; None without such a file, or if it names no step."""
    try:
        name = (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return directory / name if _STEP.fullmatch(name) else None


def point_latest(directory: Path, name: str) -> None:
    """Makes `latest` name a directory; a kill leaves what it named before, or the new name.

    Raises:
        OSError: the disk refuses.
    """
    pointer = directory / f".{LATEST}.incomplete"
    pointer.write_text(name + "\n", encoding="utf-8")
    sync_file(pointer)
    os.replace(pointer, directory / LATEST)
    sync_directory(directory)


def latest_checkpoint(directory: Path) -> Path | None:
    """The complete checkpoint that `latest` names in `directory`, else, with a warning, the one of the highest step;
    None when there is none."""
    named = named_latest(directory)
    if named is not None and is_complete(named):
        return named
    complete = [path for path in step_directories(directory) if is_complete(path)]
    if not complete:
        return None
    told = "there is none" if named is None else f"it names {named.name}, which is not complete"
    warn_once(logger, "%s should name the newest checkpoint, but %s: taking %s", directory / LATEST, told, complete[-1])
    return complete[-1]


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint directory given as itself, as the directory of checkpoints, or as the run's directory.

    Raises:
        UserError: there is no complete checkpoint at any of these.
    """
    path = Path(path)
    if is_complete(path):
        return path
    for directory in (path, path / "checkpoints"):
        found = latest_checkpoint(directory)
        if found is not None:
            return found
    raise UserError(f"{path} holds no complete checkpoint{_reason_for_none(path)}")


def _reason_for_none(path: Path) -> str:
    """What is at a path where a checkpoint was looked for, and what to do."""
    expected = f"; expected a step_* directory, a directory with `{LATEST}`, or a run's directory"
    if not path.exists():
        return f": there is no such directory{expected}"
    if not path.is_dir():
        return f": it is a file{expected}"
    if (path / "config.json").is_file() and any(path.glob("*.safetensors*")):
        return (
            ": it is a Hugging Face model directory; make a checkpoint of it with `megatron-prealign convert from-hf "
            f"--model {path} --output ...`"
        )
    steps = [path] if step_of(path) is not None else [*step_directories(path), *step_directories(path / "checkpoints")]
    if steps:
        names = shortened([each.name for each in steps], _MOST_NAMED)
        return f": {names} has no {MANIFEST}, so that its save never came to its end; use another checkpoint"
    holders = [each.name for each in sorted(path.iterdir()) if each.is_dir() and _holds_one(each)]
    if holders:
        return f" itself, but directories with some: name one of {shortened(holders, _MOST_NAMED)}"
    return expected


def _holds_one(path: Path) -> bool:
    steps = [*step_directories(path), *step_directories(path / "checkpoints")]
    return is_complete(path) or any(is_complete(each) for each in steps)
