"""Where a run starts: from its own checkpoint, from one of another run, or from scratch. Imports no torch, so that
recipes are validated without it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_prealign.checkpoint.directory import is_complete, resolve_checkpoint
from megatron_prealign.checkpoint.manifest import find_problems
from megatron_prealign.checkpoint.resume.choose import (
    RESTORE_OR_USE_ANOTHER,
    CheckpointChoice,
    candidates,
    choose,
    warn_about_fallback,
)
from megatron_prealign.checkpoint.resume.identity import read_run
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.data.blend import SavedBlend
from megatron_prealign.recipe import CheckpointSection, Recipe
from megatron_prealign.text import plural


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts."""

    kind: Literal["resume", "continue", "weights", "fresh"]
    """resume: the run's own checkpoint; continue: another run's; weights: only the weights of one; fresh: none."""
    choice: CheckpointChoice | None = None
    """Chosen checkpoint; None for a fresh start."""
    summary: dict[str, Any] | None = None
    """`state.json` of the checkpoint to resume from; None if at most its weights are loaded."""

    @property
    def checkpoint(self) -> Path:
        """Directory of the chosen checkpoint."""
        assert self.choice is not None
        return self.choice.checkpoint

    @property
    def blend(self) -> SavedBlend | None:
        """Blend to continue with; None if the run does not resume."""
        return None if self.summary is None else SavedBlend.from_state(self.checkpoint, self.summary)

    @property
    def state(self) -> TrainState | None:
        """Counters to continue from; None if the run does not resume. The phase is an index in the saved run's list."""
        return None if self.summary is None else TrainState.from_dict(self.summary["train_state"])

    @property
    def phase(self) -> str | None:
        """Name of the phase to continue in; None if the run does not resume."""
        return None if self.summary is None else self.summary["phase"]

    def describe(self) -> str:
        """Human-readable description; continues the words "the run"."""
        if self.choice is None:
            return "starts from scratch"
        if self.summary is None:
            return f"starts from the weights of {self.checkpoint}"
        state = self.summary["train_state"]
        what = "resumes from" if self.kind == "resume" else "continues another run from"
        tokens = plural(state["tokens"], "token")
        return f"{what} {self.checkpoint} (phase {self.phase}, step {state['step']:,}, {tokens})"


FRESH = StartPoint("fresh")


def preview_start(recipe: Recipe) -> StartPoint:
    """Result that `agree.choose_start` would have, in one process and without reading large files.

    Raises:
        UserError: the checkpoint is corrupt and no other may replace it.
    """
    section = recipe.checkpoint
    problems = find_problems
    directories = candidates(recipe.checkpoint_dir)
    if directories:
        return start_from("resume", choose(directories, problems, section.on_damage))
    if section.load is None:
        return FRESH
    choice = choose(checkpoints_to_load(section), problems, section.on_damage, RESTORE_OR_USE_ANOTHER)
    return start_from(kind_of_load(section), choice)


def kind_of_load(section: CheckpointSection) -> Literal["continue", "weights"]:
    """Kind of start that checkpoint.load_parts selects."""
    return "continue" if section.load_parts == "all" else "weights"


def checkpoints_to_load(section: CheckpointSection) -> list[Path]:
    """Checkpoint that checkpoint.load names, followed by older ones if it is a directory of checkpoints."""
    assert section.load is not None
    path = Path(section.load)
    if is_complete(path):
        return [path]
    newest = resolve_checkpoint(path)
    return candidates(newest.parent)


def start_from(kind: Literal["resume", "continue", "weights"], choice: CheckpointChoice) -> StartPoint:
    """Start from the chosen checkpoint.

    Raises:
        UserError: its `state.json` is corrupt, or it contains only weights and `kind` is not weights.
    """
    warn_about_fallback(choice)
    return StartPoint(kind, choice, None if kind == "weights" else read_run(choice.checkpoint))
