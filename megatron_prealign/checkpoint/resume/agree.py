"""The start of a run chosen once, before anything is opened, by all ranks together: they share the files out that are
verified, and all get the same answer."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prealign.checkpoint.manifest import FileRecord, ManifestError, find_damage, read_manifest
from megatron_prealign.checkpoint.resume.choose import (
    RESTORE_OR_NAME_ANOTHER,
    CheckpointChoice,
    candidates,
    choose,
    set_aside,
    shares,
)
from megatron_prealign.checkpoint.resume.start import FRESH, StartPoint, checkpoints_to_load, kind_of_load, start_from
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CheckpointSection, Recipe
from megatron_prealign.runtime.agreement import control_group, from_rank_zero, on_every_rank, on_rank_zero


def choose_start(recipe: Recipe) -> StartPoint:
    """Chooses and verifies the checkpoint that a run starts from. Takes part: all ranks, which share the files out.

    Raises:
        UserError: the checkpoint is damaged and none may take its place; raised on all ranks.
    """
    section = recipe.checkpoint
    directory = recipe.checkpoint_dir
    directories = from_rank_zero("looking for checkpoints", lambda: candidates(directory))
    problems = partial(_problems_by_all, checksums=section.verify == "checksums")
    if directories:
        choice = _choose(directories, problems, section.on_damage)
        return on_every_rank("reading the checkpoint", lambda: start_from("resume", choice))
    if section.load is None:
        return FRESH
    directories = from_rank_zero("looking for checkpoint.load", lambda: checkpoints_to_load(section))
    choice = _choose(directories, problems, section.on_damage, RESTORE_OR_NAME_ANOTHER)
    return on_every_rank("reading the checkpoint", lambda: start_from(kind_of_load(section), choice))


def require_intact(checkpoint: Path, section: CheckpointSection) -> None:
    """Checks the files of one checkpoint. Takes part: all ranks, which share the files out.

    Raises:
        UserError: it is damaged; raised on all ranks.
    """
    _choose(
        [checkpoint],
        partial(_problems_by_all, checksums=section.verify == "checksums"),
        "fail",
        RESTORE_OR_NAME_ANOTHER,
    )


def agree_on_start(start: StartPoint) -> None:
    """Sets damaged checkpoints of the run aside, once it is sure that the run goes on from an older one. Takes part:
    all ranks."""
    choice = start.choice
    if start.kind == "resume" and choice is not None and choice.damaged:
        on_rank_zero("setting damaged checkpoints aside", lambda: set_aside(choice))


def _choose(*arguments: Any) -> CheckpointChoice:
    """`choose`, which is the same on all ranks; one of them tells of a failure."""
    return on_every_rank("choosing a checkpoint", lambda: choose(*arguments))


def _problems_by_all(directory: Path, *, checksums: bool) -> list[str]:
    """What is wrong with a checkpoint; each rank looks at its share of the files, and all get the same answer."""

    def records_or_problem() -> dict[str, FileRecord] | str:
        try:
            return read_manifest(directory)
        except ManifestError as error:
            return str(error)

    records = from_rank_zero(f"reading {directory}", records_or_problem)
    if isinstance(records, str):
        return [records]
    group = control_group()
    own = shares(records, dist.get_world_size())[dist.get_rank()]
    found = on_every_rank(
        f"verifying {directory}", lambda: find_damage(directory, records, checksums=checksums, names=own)
    )
    told: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, found, group=group)
    problems = sorted(problem for each in told for problem in each)
    if problems:
        _check_same_disk(directory, records, told)
    return problems


def _check_same_disk(directory: Path, records: dict[str, FileRecord], told: Sequence[list[str]]) -> None:
    """What another rank finds missing must be missing for the first one too: else it is another disk, and nothing is
    damaged."""
    shared = shares(records, len(told))
    other = [name for rank, names in enumerate(shared) if rank and told[rank] for name in names]

    def look() -> None:
        if other and not told[0] and not find_damage(directory, records, checksums=False, names=other):
            missing = {rank: problems for rank, problems in enumerate(told) if any("missing" in p for p in problems)}
            if missing:
                rank = min(missing)
                raise UserError(
                    f"{directory}: process {rank} does not see files that process 0 sees ({missing[rank][0]}); "
                    "checkpoint.directory must lie on a disk that all nodes share"
                )

    on_rank_zero(f"verifying {directory}", look)
