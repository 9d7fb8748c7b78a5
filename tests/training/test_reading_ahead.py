"""Runs that read ahead are equal, bit for bit, to runs that read each step on demand."""

import copy
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import assert_facts
from support.tiny import VOCAB_SIZE, Tiny, recipe_of
from support.whole_runs import records, weights
from support.workers import WorkerPool

from megatron_prealign.errors import UserError
from megatron_prealign.training.callbacks import Callback

ALIGNMENT_STEPS, STEPS = 2, 6
ALIGNMENT_SAMPLES, SAMPLES = 4, 8
CONSUMED = ALIGNMENT_STEPS * ALIGNMENT_SAMPLES + (STEPS - ALIGNMENT_STEPS) * SAMPLES


def values_for(tiny: Tiny, directory: Path) -> dict[str, Any]:
    """Both phases, words in some language-model steps, several microbatches, evaluations between steps, a ratio that
    changes with the tokens of the phase."""
    values = copy.deepcopy(tiny.values(directory))
    values["parallel"] = {"device": "cpu"}
    values["model"].update(hidden_dropout=0.1)
    values["alignment"].update(train_iters=ALIGNMENT_STEPS)
    values["alignment_guard"] = {"interval": 2}
    values["code_switch"] = {"ratio": 0.1, "schedule": "linear", "final_ratio": 0.4, "schedule_tokens": 1000}
    values["training"].update(train_iters=STEPS - ALIGNMENT_STEPS, eval_interval=1, eval_samples=2, retrieval_words=4)
    return values


class SignalAt(Callback):
    """Sends this process a signal after a step, like a batch system; the run stops two steps later."""

    def __init__(self, step: int | None) -> None:
        self._step = step

    def on_step(self, trainer: Any) -> None:
        if trainer.state.step == self._step:
            signal.raise_signal(signal.SIGTERM)


def observed(
    values: dict[str, Any], directory: str, ahead: bool, signal_at: int | None = None, fail_at: int | None = None
) -> dict[str, Any]:
    """Runs in a worker: trains, and records the positions of the blend that were read."""
    from megatron_prealign.data.samples import TrainSamples
    from megatron_prealign.run.pretrain import pretrain
    from megatron_prealign.runtime.read_ahead import ReadAhead

    read: list[int] = []
    batch, take = TrainSamples.batch, ReadAhead.take

    def recording(samples: Any, indices: Any) -> Any:
        if fail_at in indices:
            raise UserError(f"sample {fail_at} is corrupt")
        read.extend(indices)
        return batch(samples, indices)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSamples, "batch", recording)
        if not ahead:
            patch.setattr(ReadAhead, "take", lambda self, key, following: take(self, key, following=None))
        error, state = None, None
        try:
            recipe = recipe_of(values, Path(directory))
            state = pretrain(recipe, leave_process_group=True, callbacks=[SignalAt(signal_at)]).to_dict()
        except UserError as caught:
            error = str(caught)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("read-")]
    return {"read": read, "state": state, "error": error, "threads": left}


def compared(directory: Path) -> dict[Any, dict[str, Any]]:
    unequal = ("seconds", "tokens_per_second", "data_wait_ms", "memory_gb")
    return {
        (kind, *step): {name: value for name, value in line.items() if name not in unequal}
        for kind in ("train", "evaluation")
        for step, line in records(directory, kind).items()
    }


@pytest.mark.slow
def test_reading_ahead_changes_nothing(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    on_demand, ahead = tmp_path / "on_demand", tmp_path / "ahead"
    expected = workers.run(1, observed, values_for(tiny, on_demand), str(on_demand), False)[0]
    assert expected["read"] == list(range(CONSUMED))
    # Stopped in the middle of a phase, with the next step already read, then resumed.
    stopped_at = 4
    stopped = workers.run(1, observed, values_for(tiny, ahead), str(ahead), True, stopped_at - 2)[0]
    consumed = CONSUMED - (STEPS - stopped_at) * SAMPLES
    assert stopped["state"]["step"] == stopped_at
    assert stopped["state"]["consumed_samples"] == consumed
    assert stopped["read"] == list(range(consumed + SAMPLES))
    resumed = workers.run(1, observed, values_for(tiny, ahead), str(ahead), True)[0]
    # Nothing beyond the last step.
    assert resumed["read"] == list(range(consumed, CONSUMED))
    assert resumed["state"].keys() == expected["state"].keys()
    for name in resumed["state"].keys() - {"seconds"}:
        assert resumed["state"][name] == expected["state"][name], name
    lines = compared(on_demand)
    # A run that is asked to stop does not evaluate first.
    del lines["evaluation", "language_model", stopped_at]
    assert compared(ahead) == lines
    got, want = (weights(workers, each, 2 * VOCAB_SIZE) for each in (ahead, on_demand))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())
    assert [each["threads"] for each in (expected, stopped, resumed)] == [[], [], []]


def test_a_user_error_ends_the_run_at_its_step(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    first_of_step_4 = ALIGNMENT_STEPS * ALIGNMENT_SAMPLES + SAMPLES
    result = workers.run(1, observed, values_for(tiny, tmp_path), str(tmp_path), True, None, first_of_step_4)[0]
    assert_facts(result["error"], f"sample {first_of_step_4} is corrupt")
    # The step before it was trained and logged.
    assert max(step for _, step in records(tmp_path)) == ALIGNMENT_STEPS + 1
    assert result["threads"] == []
