"""Log lines at the start of a resumed run: what changed in the recipe, and whether there is anything left to train."""

import logging
from collections.abc import Sequence

from megatron_prealign.checkpoint.resume.changes import describe_changes, nothing_to_do
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
    changes = describe_changes(recipe, start.checkpoint, state.step, phase.name)
    for line in changes:
        logger.info("%s", line)
    if phase is not phases[-1] or not phase.is_over(state):
        return
    total = state.step - state.phase_step + phase.total_iters(state)
    logger.info("%s", nothing_to_do(recipe, state.step, total, changed=bool(changes)))
