"""Chooses the checkpoint that a run resumes from: the newest one that is intact."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prealign.checkpoint.directory import (
    DAMAGED,
    LATEST,
    latest_problem,
    named_latest,
    point_latest,
    step_directories,
    step_of,
)
from megatron_prealign.checkpoint.manifest import FileRecord
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.files.sync import sync_directory
from megatron_prealign.runtime.log import warn_on_rank_zero
from megatron_prealign.text import plural

logger = logging.getLogger(__name__)

RESTORE = (
    "restore a checkpoint, or set checkpoint.directory (or logging.run_dir) to a new directory to start from scratch"
)
"""Advice if all checkpoints of a run are corrupt."""
RESTORE_OR_USE_ANOTHER = "restore it or use another checkpoint"
"""Advice if the requested checkpoint is corrupt."""

FindProblems = Callable[[Path], list[str]]
"""Function that returns the problems of a checkpoint's files, one line each; empty if it is intact."""


@dataclass(frozen=True)
class CheckpointChoice:
    """An intact checkpoint, and the newer corrupt ones."""

    checkpoint: Path
    damaged: dict[Path, list[str]] = field(default_factory=dict)
    """Directory of each corrupt checkpoint -> its problems."""


def candidates(directory: Path) -> list[Path]:
    """Checkpoint directories that a run may resume from, preferred first: the one that `latest` names and those before
    it, or all if it names none. Incomplete ones are included: a directory without a manifest is corrupt.

    Steps after `latest` belong to a branch that was abandoned when the run was rolled back.

    Raises:
        UserError: all checkpoints were renamed as corrupt, or `latest` exists and no checkpoint does.
    """
    directories = step_directories(directory)
    named = named_latest(directory)
    if named in directories:
        return directories[directories.index(named) :: -1]
    if directories:
        warn_on_rank_zero(
            logger, "%s %s; checking all step_* directories", directory / LATEST, latest_problem(directory)
        )
    elif directory.is_dir():
        renamed = sorted(path.name for path in directory.glob(f"step_*{DAMAGED}*"))
        if renamed:
            raise UserError(f"{directory} contains only corrupt checkpoints ({', '.join(renamed)}); {RESTORE}")
        if (directory / LATEST).exists():
            raise UserError(
                f"{directory / LATEST} {latest_problem(directory)}, and there is no other checkpoint; restore one, or "
                f"remove {LATEST} (or use a new directory) to start from scratch"
            )
    return directories[::-1]


def choose(
    directories: Sequence[Path],
    find_problems: FindProblems,
    on_damage: Literal["fail", "fall_back"],
    advice: str = RESTORE,
) -> CheckpointChoice:
    """Chooses the first intact checkpoint. All processes get the same result for the same arguments.

    Args:
        directories: Candidates, not empty.
        advice: What to do if none is intact.

    Raises:
        UserError: the first is corrupt and `on_damage` is fail, or all are corrupt.
    """
    damaged: dict[Path, list[str]] = {}
    for directory in directories:
        problems = find_problems(directory)
        if not problems:
            return CheckpointChoice(directory, damaged)
        damaged[directory] = problems
        if on_damage == "fail" and len(directories) > 1:
            raise UserError(
                f"{directory} is corrupt: {shortened(problems, 3)}; restore it, or set checkpoint.on_damage to "
                "fall_back to resume from an older checkpoint"
            )
    if len(damaged) == 1:
        raise UserError(f"{directories[0]} is corrupt: {shortened(damaged[directories[0]], 3)}; {advice}")
    reasons = "; ".join(f"{directory.name}: {shortened(problems, 3)}" for directory, problems in damaged.items())
    raise UserError(f"all checkpoints in {directories[0].parent} are corrupt ({reasons}); {advice}")


def partition_files(records: dict[str, FileRecord], parts: int) -> list[list[str]]:
    """Partitions the files of a manifest into `parts` lists of about equal bytes; the same on all ranks."""
    sizes = [0] * parts
    names: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(records, key=lambda name: (-records[name].bytes, name)):
        smallest = sizes.index(min(sizes))
        # Every file has a small fixed cost.
        sizes[smallest] += records[name].bytes + 4096
        names[smallest].append(name)
    return names


def warn_about_fallback(choice: CheckpointChoice) -> None:
    """Logs a warning for each corrupt checkpoint that is skipped, with the number of steps to repeat."""
    for directory, problems in choice.damaged.items():
        step, chosen = step_of(directory), step_of(choice.checkpoint)
        lost = f", repeating {plural(step - chosen, 'step')}" if step is not None and chosen is not None else ""
        warn_on_rank_zero(
            logger,
            "%s is corrupt (%s): resuming from %s instead%s",
            directory,
            shortened(problems, 3),
            choice.checkpoint.name,
            lost,
        )


def rename_damaged(choice: CheckpointChoice) -> None:
    """Points `latest` at the chosen checkpoint and appends `.damaged` to the names of the corrupt ones.

    Raises:
        OSError: a file cannot be written or renamed.
    """
    directory = choice.checkpoint.parent
    if named_latest(directory) != choice.checkpoint:
        point_latest(directory, choice.checkpoint.name)
    for damaged in choice.damaged:
        target, number = damaged.with_name(damaged.name + DAMAGED), 1
        while target.exists():
            number += 1
            target = damaged.with_name(f"{damaged.name}{DAMAGED}-{number}")
        os.rename(damaged, target)
        logger.warning(
            "renamed corrupt checkpoint %s to %s; remove it when it is no longer needed", damaged, target.name
        )
    sync_directory(directory)
