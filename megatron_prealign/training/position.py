"""Position in a run, written everywhere as `step 40/90 (language_model 10/60)`: steps of the run, then of the phase."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError
from megatron_prealign.training.phase import Phase

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer


def total_steps(phases: Sequence[Phase], state: TrainState) -> int:
    """Optimizer steps of the whole run.

    An estimate while a later phase depends on the tokens of this one (training.train_tokens after an alignment phase).
    """
    phase = phases[state.phase]
    iters = phase.total_iters(state)
    total = state.step - state.phase_step + iters
    later = replace(state)
    done = state.phase_step
    per_step = (state.tokens - state.phase_start_tokens) / done if done else phase.expected_step_tokens()
    later.tokens += round(per_step * (iters - done))
    while later.phase + 1 < len(phases):
        later.next_phase()
        # The phase itself reports a budget that is too small, when it begins.
        with suppress(UserError):
            total += phases[later.phase].total_iters(later)
    return total


def position(trainer: "Trainer") -> str:
    """Position of the last step."""
    phase, state = trainer.phase, trainer.state
    return (
        f"step {state.step}/{total_steps(trainer.phases, state)} "
        f"({phase.name} {state.phase_step}/{phase.total_iters(state)})"
    )
