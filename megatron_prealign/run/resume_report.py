"""Log lines at the start of a resumed run: what changed in the recipe, and whether there is anything left to train."""

import logging
from collections.abc import Sequence

from megatron_prealign.checkpoint.resume.changes import log_changes
from megatron_prealign.checkpoint.resume.start import StartPoint
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.recipe import Recipe
from megatron_prealign.training.phase import Phase

logger = logging.getLogger(__name__)


def report_resume(recipe: Recipe, start: StartPoint, state: TrainState, phases: Sequence[Phase]) -> None:
    """Logs each field that differs from the checkpoint's recipe, and that a complete run has nothing to do."""
    if start.summary is None:
        return
    phase = phases[state.phase]
    changes = log_changes(recipe, start.checkpoint, state.step, phase.name)
    if phase is not phases[-1] or not phase.is_over(state):
        return
    total = state.step - state.phase_step + phase.total_iters(state)
    budget = "train_iters" if recipe.training.train_tokens is None else "train_tokens"
    logger.info(
        "nothing to do: %s of %s steps are done; raise training.%s to train longer%s",
        f"{state.step:,}",
        f"{total:,}",
        budget,
        ". The changed fields have no effect until then" if changes else "",
    )
