"""Chooses the start of a run on all ranks together, before anything is opened: each rank verifies a part of the files,
and all get the same result."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prealign.checkpoint.manifest import IS_MISSING, FileRecord, ManifestError, find_damage, read_manifest
from megatron_prealign.checkpoint.resume.choose import (
    RESTORE_OR_USE_ANOTHER,
    CheckpointChoice,
    candidates,
    choose,
    partition_files,
    rename_damaged,
)
from megatron_prealign.checkpoint.resume.start import FRESH, StartPoint, checkpoints_to_load, kind_of_load, start_from
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CheckpointSection, Recipe
from megatron_prealign.runtime.agreement import control_group, from_rank_zero, on_every_rank, on_rank_zero


def choose_start(recipe: Recipe) -> StartPoint:
    """Chooses and verifies the checkpoint that a run starts from. Collective: call on all ranks.

    Raises:
        UserError: the checkpoint is corrupt and no other may replace it; raised on all ranks.
    """
    section = recipe.checkpoint
    directory = recipe.checkpoint_dir
    directories = from_rank_zero("looking for checkpoints", lambda: candidates(directory))
    problems = partial(_find_problems_on_all_ranks, checksums=section.verify == "checksums")
    if directories:
        choice = _choose(directories, problems, section.on_damage)
        return on_every_rank("reading the checkpoint", lambda: start_from("resume", choice))
    if section.load is None:
        return FRESH
    directories = from_rank_zero("looking for checkpoint.load", lambda: checkpoints_to_load(section))
    choice = _choose(directories, problems, section.on_damage, RESTORE_OR_USE_ANOTHER)
    return on_every_rank("reading the checkpoint", lambda: start_from(kind_of_load(section), choice))


def require_intact(checkpoint: Path, section: CheckpointSection) -> None:
    """Verifies the files of one checkpoint. Collective: call on all ranks.

    Raises:
        UserError: the checkpoint is corrupt; raised on all ranks.
    """
    _choose(
        [checkpoint],
        partial(_find_problems_on_all_ranks, checksums=section.verify == "checksums"),
        "fail",
        RESTORE_OR_USE_ANOTHER,
    )


def rename_damaged_checkpoints(start: StartPoint) -> None:
    """Renames corrupt checkpoints of the run after it has loaded an older one. Collective: call on all ranks."""
    choice = start.choice
    if start.kind == "resume" and choice is not None and choice.damaged:
        on_rank_zero("renaming corrupt checkpoints", lambda: rename_damaged(choice))


def _choose(*arguments: Any) -> CheckpointChoice:
    """Runs `choose` on all ranks; only one reports an error."""
    return on_every_rank("choosing a checkpoint", lambda: choose(*arguments))


def _find_problems_on_all_ranks(directory: Path, *, checksums: bool) -> list[str]:
    """Problems of a checkpoint; each rank verifies a part of the files, and all get the same result."""

    def read_records() -> dict[str, FileRecord] | str:
        try:
            return read_manifest(directory)
        except ManifestError as error:
            return str(error)

    records = from_rank_zero(f"reading {directory}", read_records)
    if isinstance(records, str):
        return [records]
    group = control_group()
    own = partition_files(records, dist.get_world_size())[dist.get_rank()]
    own_problems = on_every_rank(
        f"verifying {directory}", lambda: find_damage(directory, records, checksums=checksums, names=own)
    )
    by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, own_problems, group=group)
    problems = sorted(problem for each in by_rank for problem in each)
    if problems:
        _check_shared_file_system(directory, records, by_rank)
    return problems


def _check_shared_file_system(directory: Path, records: dict[str, FileRecord], by_rank: Sequence[list[str]]) -> None:
    """Checks that files missing on another rank are missing on rank 0 too: otherwise the file system is not shared and
    the checkpoint is not corrupt."""
    partitions = partition_files(records, len(by_rank))
    other = [name for rank, names in enumerate(partitions) if rank and by_rank[rank] for name in names]

    def check() -> None:
        if other and not by_rank[0] and not find_damage(directory, records, checksums=False, names=other):
            missing = {
                rank: problems for rank, problems in enumerate(by_rank) if any(p.endswith(IS_MISSING) for p in problems)
            }
            if missing:
                rank = min(missing)
                raise UserError(
                    f"{directory}: rank {rank} does not see files that rank 0 sees ({missing[rank][0]}); "
                    "checkpoint.directory must be on a file system that all nodes share"
                )

    on_rank_zero(f"verifying {directory}", check)
