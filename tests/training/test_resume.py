"""A run that stopped and went on ends bit for bit where the run that never stopped ends."""

import copy
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE, Tiny, recipe_of
from whole_runs import records, run, weights
from workers import WorkerError, WorkerPool

from megatron_prealign.training.callbacks import Callback

STEPS = 10
WORLD_SIZE = 2
BORDER = 5


def values_for(tiny: Tiny, run_dir: Path, precision: str) -> dict[str, Any]:
    values = copy.deepcopy(tiny.values(run_dir))
    # Dropout makes the random states matter.
    values["model"].update(hidden_dropout=0.1, attention_dropout=0.1)
    values["parallel"] = {"device": "cpu"}
    values["training"]["precision"] = precision
    values["checkpoint"] = {"save_interval": 1, "keep": 100}
    return values


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def whole(
    request: pytest.FixtureRequest, workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A run that never stopped, with a checkpoint after every step."""
    folder = tmp_path_factory.mktemp(f"whole_{request.param}")
    run(workers, WORLD_SIZE, values_for(tiny, folder, request.param), folder)
    return request.param, folder, weights(workers, folder, 2 * VOCAB_SIZE)


@pytest.mark.parametrize("step", [2, BORDER, 8])
def test_resumed_run_is_bit_equal(workers: WorkerPool, tiny: Tiny, tmp_path: Path, whole: Any, step: int) -> None:
    precision, folder, expected = whole
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    name = f"step_{step:08d}"
    shutil.copytree(folder / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(name)
    run(workers, WORLD_SIZE, values_for(tiny, tmp_path, precision), tmp_path)
    got = records(tmp_path)
    assert sorted(number for _, number in got) == list(range(step + 1, STEPS + 1))
    for key, line in got.items():
        for value in ("loss", "lm_loss", "grad_norm", "alignment_loss", "switched_words"):
            assert line.get(value) == records(folder)[key].get(value), (key, value)
    resumed = weights(workers, tmp_path, 2 * VOCAB_SIZE)
    assert resumed.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert torch.equal(resumed[parameter], tensor), parameter


# Saved in one layout, resumed in another: world size and parallel section of each.
MOVES = {
    "tp2_to_pp2": ((2, {"tensor_model_parallel_size": 2}), (2, {"pipeline_model_parallel_size": 2})),
    # The optimizer's state, sharded over two ranks and saved through one of them, comes back whole.
    "dp2_to_one": ((2, {}), (1, {})),
}


@pytest.mark.parametrize("move", MOVES)
def test_resuming_in_another_layout_goes_on(workers: WorkerPool, tiny: Tiny, tmp_path: Path, move: str) -> None:
    """Losses stay those of the run that never changed."""
    (world_size, parallel), (other_world_size, other_parallel) = MOVES[move]
    values = values_for(tiny, tmp_path / "whole", "fp32")
    values["model"].update(hidden_dropout=0.0, attention_dropout=0.0)
    values["parallel"].update(parallel)
    run(workers, world_size, values, tmp_path / "whole")
    moved = copy.deepcopy(values)
    moved["logging"]["run_dir"] = str(tmp_path / "moved")
    moved["parallel"] = {"device": "cpu", **other_parallel}
    checkpoints = tmp_path / "moved" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step_00000007", checkpoints / "step_00000007")
    (checkpoints / "latest").write_text("step_00000007")
    run(workers, other_world_size, moved, tmp_path / "moved")
    expected = records(tmp_path / "whole")
    got = records(tmp_path / "moved")
    assert sorted(number for _, number in got) == [8, 9, 10]
    for key, line in got.items():
        # Another layout adds in another order: fp32 rounding over three steps.
        assert line["loss"] == pytest.approx(expected[key]["loss"], rel=1e-5), key


class SignalAt(Callback):
    """Sends this process a signal after a step, as a batch system would."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, trainer: Any) -> None:
        if trainer.state.step == self._step and trainer.runtime.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def train_until_signal(values: dict[str, Any], folder: str, step: int) -> dict[str, Any]:
    from megatron_prealign.pretrain import pretrain

    state = pretrain(recipe_of(values, Path(folder)), leave_process_group=True, callbacks=[SignalAt(step)])
    return {"stopped": state.stop_requested, "step": state.step}


def test_signal_on_one_rank_saves_and_ends_all_ranks(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(tiny, tmp_path, "fp32")
    values["checkpoint"] = {"keep": 1}
    ends = workers.run(2, train_until_signal, values, str(tmp_path), 6)
    assert ends[0] == ends[1]
    assert ends[0]["stopped"]
    # The flag is read one step after it was sent round.
    assert 7 <= ends[0]["step"] <= 8
    state = json.loads((tmp_path / "checkpoints" / f"step_{ends[0]['step']:08d}" / "state.json").read_text())
    assert state["train_state"]["step"] == ends[0]["step"]
    assert state["phase"] == "language_model"
    run(workers, 2, values, tmp_path)
    assert max(number for _, number in records(tmp_path)) == STEPS


def test_finished_run_does_nothing_more(workers: WorkerPool, tiny: Tiny, tmp_path: Path, whole: Any) -> None:
    precision, folder, _ = whole
    before = (folder / "metrics.jsonl").read_text()
    run(workers, WORLD_SIZE, values_for(tiny, folder, precision), folder)
    assert (folder / "metrics.jsonl").read_text() == before


def test_checkpoint_of_another_model_is_refused(workers: WorkerPool, tiny: Tiny, whole: Any) -> None:
    precision, folder, _ = whole
    values = values_for(tiny, folder, precision)
    values["model"]["hidden_size"] = 64
    with pytest.raises(WorkerError) as caught:
        run(workers, WORLD_SIZE, values, folder)
    for kind, message, _ in caught.value.failures.values():
        assert kind == "UserError"
        assert "hidden_size 32 (recipe: 64)" in message
