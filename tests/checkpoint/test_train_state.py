"""The counters of a run."""

from dataclasses import fields
from typing import Any

import pytest
from support.messages import user_error

from megatron_prealign.checkpoint.train_state import TrainState

STATE = TrainState(
    phase=0,
    phase_step=7,
    step=9,
    tokens=500,
    phase_start_tokens=100,
    consumed_samples=40,
    phase_start_samples=8,
    phase_done=True,
    below_floor=True,
    seconds=1.5,
    stop_requested=True,
)


def test_saved_counters_are_restored_without_the_stop_request() -> None:
    saved = STATE.to_dict()
    assert set(saved) == {field.name for field in fields(TrainState)} - {"stop_requested"}
    loaded = TrainState.from_dict(saved)
    assert not loaded.stop_requested
    assert loaded.to_dict() == saved
    assert (loaded.phase_step, loaded.tokens, loaded.phase_done, loaded.seconds) == (7, 500, True, 1.5)
    assert loaded.below_floor is True
    assert TrainState.from_dict({**saved, "below_floor": False}).below_floor is False


def test_a_run_does_not_start_below_the_floor() -> None:
    assert TrainState().below_floor is False


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"below_floor": 1}, ("train_state.below_floor is 1", "bool")),
        ({"below_floor": None}, ("train_state.below_floor is None", "bool")),
        ({"above": 1}, ("train_state: counters above",)),
    ],
)
def test_invalid_counters(changes: dict[str, Any], facts: tuple[str, ...]) -> None:
    with user_error(*facts, kind=ValueError):
        TrainState.from_dict({**STATE.to_dict(), **changes})


def test_a_missing_counter_is_reported() -> None:
    saved = STATE.to_dict()
    del saved["tokens"]
    with user_error("train_state: counters tokens", kind=ValueError):
        TrainState.from_dict(saved)


def test_next_phase_starts_its_own_counters_only() -> None:
    state = TrainState.from_dict(STATE.to_dict())
    state.next_phase()
    assert state == TrainState(
        phase=1,
        phase_step=0,
        step=9,
        tokens=500,
        phase_start_tokens=500,
        consumed_samples=40,
        phase_start_samples=40,
        phase_done=False,
        # The measurement at the end of one phase applies to the next.
        below_floor=True,
        seconds=1.5,
    )
