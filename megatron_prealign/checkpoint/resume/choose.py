"""Which checkpoint a run goes on from: the newest one whose files are what they were when they were written."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prealign.checkpoint.directory import LATEST, named_latest, point_latest, step_directories, step_of
from megatron_prealign.checkpoint.manifest import FileRecord
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.files.sync import sync_directory
from megatron_prealign.runtime.log import warn_once

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"
"""Ending of the name of a directory that was set aside; nothing reads or removes it."""

RESTORE = "restore a checkpoint, or set checkpoint.directory (or logging.run_dir) to a new directory to begin anew"
"""What to do where a run has checkpoints and none of them is good."""
RESTORE_OR_NAME_ANOTHER = "restore it, or name another checkpoint"
"""What to do about a checkpoint that was named."""

FindProblems = Callable[[Path], list[str]]
"""What is wrong with the files of a checkpoint, a line each; empty when all is well."""


@dataclass(frozen=True)
class CheckpointChoice:
    """A good checkpoint, and the damaged ones that are newer."""

    checkpoint: Path
    damaged: dict[Path, list[str]] = field(default_factory=dict)
    """Directory -> what is wrong with it."""


def candidates(directory: Path) -> list[Path]:
    """The directories of checkpoints that a run may go on from, the best first: the one that `latest` names and those
    before it, or all if it names none. Complete or not: a directory that lacks its manifest is a damaged one.

    Steps behind `latest` belong to a branch that was left when the run was rolled back.

    Raises:
        UserError: there are none but such that were set aside as damaged, or `latest` names one and all are gone.
    """
    directories = step_directories(directory)
    named = named_latest(directory)
    if named in directories:
        return directories[directories.index(named) :: -1]
    if directories:
        told = "there is no such file" if named is None else f"it names {named.name}, which is not there"
        warn_once(
            logger,
            "%s should name the newest checkpoint, but %s: looking at all step_* directories",
            directory / LATEST,
            told,
        )
    elif directory.is_dir():
        aside = sorted(path.name for path in directory.glob(f"step_*{DAMAGED}*"))
        if aside:
            raise UserError(
                f"{directory} holds damaged checkpoints alone ({', '.join(aside)}), expected a good one; restore one, "
                "or set checkpoint.directory (or logging.run_dir) to a new directory to begin anew"
            )
        if named is not None:
            raise UserError(
                f"{directory / LATEST} names {named.name}, but neither that nor any other checkpoint is there; restore "
                f"one, or remove {LATEST} (or choose a new directory) to begin anew"
            )
    return directories[::-1]


def choose(
    directories: Sequence[Path],
    find_problems: FindProblems,
    on_damage: Literal["fail", "fall_back"],
    advice: str = RESTORE,
) -> CheckpointChoice:
    """The first good one of `directories`, which are not empty. Every process that calls it with the same arguments
    gets the same answer.

    Args:
        advice: What else to do when none is good.

    Raises:
        UserError: the first is damaged and `on_damage` is fail, or all are damaged.
    """
    damaged: dict[Path, list[str]] = {}
    for directory in directories:
        problems = find_problems(directory)
        if not problems:
            return CheckpointChoice(directory, damaged)
        damaged[directory] = problems
        if on_damage == "fail" and len(directories) > 1:
            raise UserError(
                f"{directory} is damaged: {shortened(problems, 3)}; restore it, or go on from an older checkpoint with "
                "checkpoint.on_damage fall_back"
            )
    if len(damaged) == 1:
        raise UserError(f"{directories[0]} is damaged: {shortened(damaged[directories[0]], 3)}; {advice}")
    told = "; ".join(f"{directory.name}: {shortened(problems, 3)}" for directory, problems in damaged.items())
    raise UserError(f"{directories[0].parent} holds no good checkpoint ({told}); {advice}")


def shares(records: dict[str, FileRecord], parts: int) -> list[list[str]]:
    """The files of a manifest in `parts` shares of about equal size, the same whoever asks."""
    filled = [0] * parts
    names: list[list[str]] = [[] for _ in range(parts)]
    for name in sorted(records, key=lambda name: (-records[name].bytes, name)):
        smallest = filled.index(min(filled))
        # A file costs a little whatever its size.
        filled[smallest] += records[name].bytes + 4096
        names[smallest].append(name)
    return names


def warn_of_fallback(choice: CheckpointChoice) -> None:
    """A line for each checkpoint that is passed over, with what going on from an older one costs."""
    for directory, problems in choice.damaged.items():
        step, good = step_of(directory), step_of(choice.checkpoint)
        lost = f", {step - good:,} steps are done again" if step is not None and good is not None else ""
        warn_once(
            logger,
            "%s is damaged (%s): going on from %s instead%s",
            directory,
            shortened(problems, 3),
            choice.checkpoint.name,
            lost,
        )


def set_aside(choice: CheckpointChoice) -> None:
    """Points `latest` at the good checkpoint and renames the damaged ones, so that nothing takes them for good.

    Raises:
        OSError: the disk refuses.
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
        logger.warning("%s was renamed to %s; remove it when you no longer need it", damaged, target.name)
    sync_directory(directory)
