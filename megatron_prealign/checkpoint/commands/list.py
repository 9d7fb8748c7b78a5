"""What lies in a directory of checkpoints, told from their small files. Imports no torch: a thousand of them are a
matter of a second."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.directory import LATEST, step_of
from megatron_prealign.checkpoint.manifest import MANIFEST, find_problems
from megatron_prealign.checkpoint.state import STATE, is_run, read_state
from megatron_prealign.errors import UserError

_COLUMNS = ("checkpoint", "status", "kind", "saved", "size", "phase", "tokens", "measures")


@dataclass(frozen=True)
class ListedCheckpoint:
    """One directory, as far as its small files and the sizes of the others tell."""

    name: str
    latest: bool
    """Whether `latest` names it."""
    problems: tuple[str, ...]
    """Empty for a complete checkpoint; its files are not read for this."""
    complete: bool
    """Whether it was ever completed."""
    kind: str | None
    """run or weights; None if its state.json cannot be read, as for what follows."""
    step: int | None
    saved_at: str | None
    """ISO time."""
    bytes: int
    """Of all files, as they are."""
    phase: str | None
    tokens: int | None
    metrics: dict[str, float]

    @property
    def status(self) -> str:
        return ("damaged" if self.complete else "incomplete") if self.problems else "complete"


def checkpoint_directories(path: Path) -> list[Path]:
    """The directories of checkpoints at `path` by step, then by name, complete or not: a run's directory, a directory
    of checkpoints, or one checkpoint.

    Raises:
        UserError: there is none.
    """
    # `.` has no name of its own.
    path = path if path.name not in ("", "..") else path.resolve()
    if _is_checkpoint(path):
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    try:
        found = [each for each in directory.iterdir() if each.is_dir() and _is_checkpoint(each)]
    except OSError as error:
        raise UserError(
            f"{directory}: cannot be read ({error.strerror}); expected a directory of checkpoints or a run's directory"
        ) from error
    if not found:
        raise UserError(f"{directory} holds no checkpoints; expected step_* directories, as pretrain writes them")
    return sorted(found, key=lambda each: (_step_in(each) is None, _step_in(each) or 0, each.name))


def list_checkpoints(path: Path) -> list[ListedCheckpoint]:
    """Every checkpoint at `path`, in the order of `checkpoint_directories`.

    Raises:
        UserError: there is none.
    """
    directories = checkpoint_directories(path)
    latest = _latest_name(directories[0].parent)
    return [_look_at(directory, directory.name == latest) for directory in directories]


def find_pointer_problem(path: Path) -> str | None:
    """What is wrong with the file `latest` at `path`, in words; None when all is well or there is none."""
    directory = checkpoint_directories(path)[0].parent
    name = _latest_name(directory)
    if name is None or (name and (directory / name / STATE).exists()):
        return None
    return f"{directory / LATEST} names {name!r}, which is no checkpoint there"


def directory_bytes(directory: Path) -> int:
    """Size of all files in it, but for those that a save or a removal takes away meanwhile."""
    total = 0
    # Unlike rglob it passes over directories that are gone.
    for parent, _, names in os.walk(directory):
        for name in names:
            with suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def render(listed: Sequence[ListedCheckpoint]) -> list[str]:
    """A table with a line for each checkpoint; what is wrong with one follows below it."""
    rows = [list(_COLUMNS), *(_row(each) for each in listed)]
    # Measures are the last column, of any width.
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS) - 1)]
    lines = []
    for row, checkpoint in zip(rows, [None, *listed], strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
        for problem in checkpoint.problems[:3] if checkpoint is not None else ():
            lines.append(f"    {problem}")
        if checkpoint is not None and len(checkpoint.problems) > 3:
            lines.append(f"    and {len(checkpoint.problems) - 3} more")
    return lines


def readable_bytes(count: int) -> str:
    """Such as 1.5 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _latest_name(directory: Path) -> str | None:
    """The first 200 characters of what is in `latest`; None if there is no such file."""
    try:
        with (directory / LATEST).open(encoding="utf-8", errors="replace") as pointer:
            return pointer.read(200).strip()
    except OSError:
        return None


def _is_checkpoint(directory: Path) -> bool:
    named = step_of(directory) is not None or _step_in(directory) is not None
    return named or (directory / STATE).exists() or (directory / MANIFEST).exists()


def _step_in(directory: Path) -> int | None:
    """The step in the name of a directory that a save or a damage gave another one: .step_X.incomplete,
    step_X.damaged."""
    return step_of(Path(directory.name.lstrip(".").split(".")[0]))


def _look_at(directory: Path, latest: bool) -> ListedCheckpoint:
    problems, complete = find_problems(directory), (directory / MANIFEST).exists()
    summary: dict[str, Any] = {}
    try:
        summary = read_state(directory)
    except UserError as error:
        problems = [*problems, *([str(error).split(";")[0]] if complete else [])]
    if directory.name.startswith("."):
        problems, complete = ["a save that did not come to its end, or is under way"], False
    elif ".damaged" in directory.name:
        problems = problems or ["it was found damaged by a start"]
    state = summary.get("train_state")
    state = state if isinstance(state, dict) else {}
    metrics = summary.get("metrics")
    return ListedCheckpoint(
        name=directory.name,
        latest=latest,
        problems=tuple(problems),
        complete=complete,
        kind=None if not summary else "run" if is_run(summary) else "weights",
        step=state.get("step", _step_in(directory)),
        saved_at=summary.get("saved_at"),
        bytes=directory_bytes(directory),
        phase=summary.get("phase"),
        tokens=state.get("tokens"),
        metrics=metrics if isinstance(metrics, dict) else {},
    )


def _row(checkpoint: ListedCheckpoint) -> list[str]:
    measures = [
        f"{name} {value:.4g}" if isinstance(value, int | float) else f"{name} {json.dumps(value)}"
        for name, value in sorted(checkpoint.metrics.items())
    ]
    return [
        checkpoint.name + (" *" if checkpoint.latest else ""),
        checkpoint.status,
        checkpoint.kind or "?",
        (checkpoint.saved_at or "?")[:19].replace("T", " "),
        readable_bytes(checkpoint.bytes),
        checkpoint.phase or "-",
        "-" if checkpoint.tokens is None else f"{checkpoint.tokens:,}",
        ", ".join(measures) or "-",
    ]
