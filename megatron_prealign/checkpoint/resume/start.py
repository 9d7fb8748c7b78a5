"""Where a run starts: at a checkpoint of its own, at one of another run, or anew. Imports no torch, so that a recipe is
checked without it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_prealign.checkpoint.directory import is_complete, resolve_checkpoint
from megatron_prealign.checkpoint.manifest import find_problems
from megatron_prealign.checkpoint.resume.choose import (
    RESTORE_OR_NAME_ANOTHER,
    CheckpointChoice,
    candidates,
    choose,
    warn_of_fallback,
)
from megatron_prealign.checkpoint.resume.identity import read_run
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.data.blend import SavedBlend
from megatron_prealign.recipe import CheckpointSection, Recipe


@dataclass(frozen=True)
class StartPoint:
    """What a run starts from."""

    kind: Literal["resume", "continue", "weights", "fresh"]
    """resume: its own checkpoint; continue: all of another run's; weights: those alone."""
    choice: CheckpointChoice | None = None
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


FRESH = StartPoint("fresh")


def preview_start(recipe: Recipe) -> StartPoint:
    """What `agree.choose_start` would find, as far as one process sees it without reading large files.

    Raises:
        UserError: the checkpoint is damaged and none may take its place.
    """
    section = recipe.checkpoint
    problems = find_problems
    directories = candidates(recipe.checkpoint_dir)
    if directories:
        return start_from("resume", choose(directories, problems, section.on_damage))
    if section.load is None:
        return FRESH
    choice = choose(checkpoints_to_load(section), problems, section.on_damage, RESTORE_OR_NAME_ANOTHER)
    return start_from(kind_of_load(section), choice)


def kind_of_load(section: CheckpointSection) -> Literal["continue", "weights"]:
    """What checkpoint.load_parts asks for."""
    return "continue" if section.load_parts == "all" else "weights"


def checkpoints_to_load(section: CheckpointSection) -> list[Path]:
    """What checkpoint.load names, and, if that is a directory of checkpoints, the older ones behind it."""
    assert section.load is not None
    path = Path(section.load)
    if is_complete(path):
        return [path]
    newest = resolve_checkpoint(path)
    return candidates(newest.parent)


def start_from(kind: Literal["resume", "continue", "weights"], choice: CheckpointChoice) -> StartPoint:
    """The start at a checkpoint that was chosen.

    Raises:
        UserError: its `state.json` is damaged, or it holds weights alone and a run was to go on from it.
    """
    warn_of_fallback(choice)
    return StartPoint(kind, choice, None if kind == "weights" else read_run(choice.checkpoint))
