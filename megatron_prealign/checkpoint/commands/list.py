"""Lists the checkpoints of a directory from their small files. Imports no torch: a thousand take about a second."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.directory import DAMAGED, LATEST, directory_bytes, step_of
from megatron_prealign.checkpoint.manifest import MANIFEST, find_problems
from megatron_prealign.checkpoint.state import STATE, is_run, read_state
from megatron_prealign.errors import UserError
from megatron_prealign.text import readable_bytes

_COLUMNS = ("checkpoint", "status", "kind", "saved", "size", "phase", "tokens", "metrics")


@dataclass(frozen=True)
class ListedCheckpoint:
    """One checkpoint directory, from its small files and the sizes of the others."""

    name: str
    latest: bool
    """Whether `latest` names this checkpoint."""
    problems: tuple[str, ...]
    """Problems found without reading the large files; empty for a complete checkpoint."""
    complete: bool
    """Whether the save completed."""
    kind: str | None
    """run or weights; None, as for the following fields, if state.json cannot be read."""
    step: int | None
    saved_at: str | None
    """Time of the save in ISO 8601."""
    bytes: int
    """Current size of all files."""
    phase: str | None
    tokens: int | None
    metrics: dict[str, float]

    @property
    def status(self) -> str:
        return ("corrupt" if self.complete else "incomplete") if self.problems else "complete"


def checkpoint_directories(path: Path) -> list[Path]:
    """Checkpoint directories at `path` by step, then by name, complete or not.

    Args:
        path: Run directory, directory of checkpoints, or one checkpoint.

    Raises:
        UserError: there is no checkpoint.
    """
    # `.` has no name.
    path = path if path.name not in ("", "..") else path.resolve()
    if _is_checkpoint(path):
        return [path]
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    try:
        checkpoints = [each for each in directory.iterdir() if each.is_dir() and _is_checkpoint(each)]
    except OSError as error:
        raise UserError(
            f"cannot read {directory}: {error.strerror}; expected a directory of checkpoints or a run directory"
        ) from error
    if not checkpoints:
        raise UserError(f"{directory}: no checkpoints found; expected step_* directories written by pretrain")
    return sorted(checkpoints, key=lambda each: (_step_in(each) is None, _step_in(each) or 0, each.name))


def list_checkpoints(path: Path) -> list[ListedCheckpoint]:
    """All checkpoints at `path`, in the order of `checkpoint_directories`.

    Raises:
        UserError: there is no checkpoint.
    """
    directories = checkpoint_directories(path)
    latest = _latest_name(directories[0].parent)
    return [_summarise(directory, directory.name == latest) for directory in directories]


def find_latest_problem(path: Path) -> str | None:
    """Problem of the file `latest` at `path`; None if it is valid or missing."""
    directory = checkpoint_directories(path)[0].parent
    name = _latest_name(directory)
    if name is None or (name and (directory / name / STATE).exists()):
        return None
    return f"{directory / LATEST} names {name!r}, which is not a checkpoint in this directory"


def render(listed: Sequence[ListedCheckpoint]) -> list[str]:
    """Lines of a table with one row for each checkpoint, followed by its problems."""
    rows = [list(_COLUMNS), *(_row(each) for each in listed)]
    # The metrics are the last column, of any width.
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


def _latest_name(directory: Path) -> str | None:
    """First 200 characters of the file `latest`; None if it cannot be read."""
    try:
        with (directory / LATEST).open(encoding="utf-8", errors="replace") as pointer:
            return pointer.read(200).strip()
    except OSError:
        return None


def _is_checkpoint(directory: Path) -> bool:
    named = step_of(directory) is not None or _step_in(directory) is not None
    return named or (directory / STATE).exists() or (directory / MANIFEST).exists()


def _step_in(directory: Path) -> int | None:
    """Step in the name of an unfinished or renamed checkpoint: .step_X.incomplete, step_X.damaged."""
    return step_of(Path(directory.name.lstrip(".").split(".")[0]))


def _summarise(directory: Path, latest: bool) -> ListedCheckpoint:
    problems, complete = find_problems(directory), (directory / MANIFEST).exists()
    summary: dict[str, Any] = {}
    try:
        summary = read_state(directory)
    except UserError as error:
        problems = [*problems, *([str(error).split(";")[0]] if complete else [])]
    if directory.name.startswith("."):
        problems, complete = ["the save is in progress or was interrupted"], False
    elif DAMAGED in directory.name:
        problems = problems or ["renamed by a run that found it corrupt"]
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
    metrics = [
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
        ", ".join(metrics) or "-",
    ]
