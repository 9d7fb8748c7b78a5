"""The counters of a run."""

from dataclasses import fields

from megatron_prealign.training.state import TrainState

STATE = TrainState(
    phase=0,
    phase_step=7,
    step=9,
    tokens=500,
    phase_start_tokens=100,
    consumed_samples=40,
    phase_done=True,
    seconds=1.5,
    stop_requested=True,
)


def test_saved_counters_come_back_without_the_request_to_stop() -> None:
    saved = STATE.to_dict()
    assert set(saved) == {field.name for field in fields(TrainState)} - {"stop_requested"}
    loaded = TrainState.from_dict(saved)
    assert not loaded.stop_requested
    assert loaded.to_dict() == saved
    assert (loaded.phase_step, loaded.tokens, loaded.phase_done, loaded.seconds) == (7, 500, True, 1.5)


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
        phase_done=False,
        seconds=1.5,
    )
