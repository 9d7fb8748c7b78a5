"""Where a run starts: at a checkpoint of its own, at one of another run, or anew. Decided once, before anything is
opened, and the same on all ranks."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_prealign.checkpoint.choose import (
    Choice,
    candidates,
    choose,
    find_problems,
    set_aside,
    shares,
    warn_of_fall_back,
)
from megatron_prealign.checkpoint.folder import is_complete, resolve_checkpoint
from megatron_prealign.checkpoint.manifest import FileRecord, ManifestError, find_damage, read_manifest
from megatron_prealign.data.blend import SavedBlend
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CheckpointSection, Recipe
from megatron_prealign.runtime.agreement import control_group, from_rank_zero, on_every_rank, on_rank_zero
from megatron_prealign.training.run_identity import read_run
from megatron_prealign.training.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    kind: Literal["resume", "continue", "weights", "fresh"]
    """resume: its own checkpoint; continue: all of another run's; weights: those alone."""
    choice: Choice | None = None
    """None for a fresh start."""
    summary: dict[str, Any] | None = None
    """`state.json` of a checkpoint to go on from; None if nothing but weights is taken."""

    @property
    def checkpoint(self) -> Path:
        assert self.choice is not None
        return self.choice.checkpoint

    @property
    def blend(self) -> SavedBlend | None:
        """The blend to go on with; None for a run that begins."""
        return None if self.summary is None else SavedBlend.from_state(self.checkpoint, self.summary)

    @property
    def state(self) -> TrainState | None:
        """The counters to go on from; their phase is a position in the saved run's list."""
        return None if self.summary is None else TrainState.from_dict(self.summary["train_state"])

    @property
    def phase(self) -> str | None:
        """Name of the phase to go on in."""
        return None if self.summary is None else self.summary["phase"]

    def describe(self) -> str:
        """One line for people."""
        if self.choice is None:
            return "starts anew"
        if self.summary is None:
            return f"takes the weights of {self.checkpoint}"
        state = self.summary["train_state"]
        what = "resumes from" if self.kind == "resume" else "goes on from another run's"
        return f"{what} {self.checkpoint} (phase {self.phase}, step {state['step']:,}, {state['tokens']:,} tokens)"


FRESH = Start("fresh")


def choose_start(recipe: Recipe) -> Start:
    """Chooses and verifies the checkpoint that a run starts from. Takes part: all ranks, which share the files out.

    Raises:
        UserError: the checkpoint is damaged and none may take its place; raised on all ranks.
    """
    section = recipe.checkpoint
    directory = recipe.checkpoint_dir
    folders = from_rank_zero("looking for checkpoints", lambda: candidates(directory))
    problems = partial(_problems_by_all, checksums=section.verify == "checksums")
    if folders:
        choice = choose(folders, problems, section.on_damage)
        return on_every_rank("reading the checkpoint", lambda: _start_at("resume", choice))
    if section.load is None:
        return FRESH
    folders = from_rank_zero("looking for checkpoint.load", lambda: _loadable(section))
    choice = choose(folders, problems, section.on_damage)
    return on_every_rank("reading the checkpoint", lambda: _start_at(_kind_of_load(section), choice))


def preview_start(recipe: Recipe) -> Start:
    """What `choose_start` would find, as far as one process sees it without reading large files.

    Raises:
        UserError: as `choose_start`.
    """
    section = recipe.checkpoint
    problems = partial(find_problems, checksums=False)
    folders = candidates(recipe.checkpoint_dir)
    if folders:
        return _start_at("resume", choose(folders, problems, section.on_damage))
    if section.load is None:
        return FRESH
    return _start_at(_kind_of_load(section), choose(_loadable(section), problems, section.on_damage))


def verify_checkpoint(checkpoint: Path, section: CheckpointSection) -> None:
    """Checks the files of one checkpoint. Takes part: all ranks, which share the files out.

    Raises:
        UserError: it is damaged; raised on all ranks.
    """
    choose([checkpoint], partial(_problems_by_all, checksums=section.verify == "checksums"), "fail")


def settle_start(start: Start) -> None:
    """Sets damaged checkpoints of the run aside, once it is sure that the run goes on from an older one. Takes part:
    all ranks."""
    choice = start.choice
    if start.kind == "resume" and choice is not None and choice.damaged:
        on_rank_zero("setting damaged checkpoints aside", lambda: set_aside(choice))


def _kind_of_load(section: CheckpointSection) -> Literal["continue", "weights"]:
    return "continue" if section.load_parts == "all" else "weights"


def _loadable(section: CheckpointSection) -> list[Path]:
    """What checkpoint.load names, and, if that is a folder of checkpoints, the older ones behind it."""
    assert section.load is not None
    path = Path(section.load)
    if is_complete(path):
        return [path]
    newest = resolve_checkpoint(path)
    return candidates(newest.parent)


def _start_at(kind: Literal["resume", "continue", "weights"], choice: Choice) -> Start:
    warn_of_fall_back(choice)
    return Start(kind, choice, None if kind == "weights" else read_run(choice.checkpoint))


def _problems_by_all(folder: Path, *, checksums: bool) -> list[str]:
    """What is wrong with a checkpoint; each rank looks at its share of the files, and all get the same answer."""

    def records_or_problem() -> dict[str, FileRecord] | str:
        try:
            return read_manifest(folder)
        except ManifestError as error:
            return str(error)

    records = from_rank_zero(f"reading {folder}", records_or_problem)
    if isinstance(records, str):
        return [records]
    group = control_group()
    own = shares(records, dist.get_world_size())[dist.get_rank()]
    found = on_every_rank(f"verifying {folder}", lambda: find_damage(folder, records, checksums=checksums, names=own))
    told: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, found, group=group)
    problems = sorted(problem for each in told for problem in each)
    if problems:
        _check_same_disk(folder, records, told)
    return problems


def _check_same_disk(folder: Path, records: dict[str, FileRecord], told: Sequence[list[str]]) -> None:
    """What another rank finds missing must be missing for the first one too: else it is another disk, and nothing is
    damaged."""
    shared = shares(records, len(told))
    other = [name for rank, names in enumerate(shared) if rank and told[rank] for name in names]

    def look() -> None:
        if other and not told[0] and not find_damage(folder, records, checksums=False, names=other):
            missing = {rank: problems for rank, problems in enumerate(told) if any("missing" in p for p in problems)}
            if missing:
                rank = min(missing)
                raise UserError(
                    f"{folder}: process {rank} does not see files that process 0 sees ({missing[rank][0]}); "
                    "checkpoint.directory must lie on a disk that all nodes share"
                )

    on_rank_zero(f"verifying {folder}", look)
