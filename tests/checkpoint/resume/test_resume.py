"""A resumed run ends bitwise equal to an uninterrupted run."""

import copy
import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import slow_except
from support.tiny import VOCAB_SIZE, Tiny, recipe_of
from support.whole_runs import records, run, weights
from support.workers import WorkerError, WorkerPool

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


@pytest.fixture(scope="module")
def uninterrupted(
    workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, torch.Tensor]]]:
    """Directory and weights of an uninterrupted run with a checkpoint after every step, in a precision."""

    @cache
    def trained(precision: str) -> tuple[Path, dict[str, torch.Tensor]]:
        directory = tmp_path_factory.mktemp(f"uninterrupted_{precision}")
        run(workers, WORLD_SIZE, values_for(tiny, directory, precision), directory)
        return directory, weights(workers, directory, 2 * VOCAB_SIZE)

    return trained


# The first step of a phase has a fresh optimizer, but for its fp32 master weights, which only bf16 has.
@pytest.mark.parametrize(
    ("precision", "step"),
    slow_except([("fp32", 2), ("fp32", BORDER), ("bf16", 3), ("bf16", BORDER), ("bf16", 8)], ("fp32", BORDER)),
)
def test_resumed_run_is_bit_equal(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, uninterrupted: Any, precision: str, step: int
) -> None:
    directory, expected = uninterrupted(precision)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    name = f"step_{step:08d}"
    shutil.copytree(directory / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(name)
    run(workers, WORLD_SIZE, values_for(tiny, tmp_path, precision), tmp_path)
    got = records(tmp_path)
    assert sorted(number for _, number in got) == list(range(step + 1, STEPS + 1))
    for key, line in got.items():
        for value in ("loss", "lm_loss", "grad_norm", "alignment_loss", "switched_words"):
            assert line.get(value) == records(directory)[key].get(value), (key, value)
    resumed = weights(workers, tmp_path, 2 * VOCAB_SIZE)
    assert resumed.keys() == expected.keys()
    for parameter, tensor in expected.items():
        assert torch.equal(resumed[parameter], tensor), parameter


def without_switching(values: dict[str, Any]) -> None:
    del values["code_switch"]
    values["parallel"]["tensor_model_parallel_size"] = 2


def with_guard(values: dict[str, Any]) -> None:
    """Alignment words in every second language-model step, over pipeline stages; two microbatches per step."""
    values["alignment_guard"] = {"interval": 2}
    values["parallel"]["pipeline_model_parallel_size"] = 2


@pytest.mark.slow
@pytest.mark.parametrize(("change", "step"), [(without_switching, BORDER), (with_guard, 8)])
def test_resumed_run_is_bit_equal_in_other_layouts(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, change: Any, step: int
) -> None:
    values = values_for(tiny, tmp_path, "fp32")
    values["training"].update(train_iters=4, retrieval_words=2, eval_samples=2)
    change(values)
    run(workers, WORLD_SIZE, values, tmp_path)
    expected = weights(workers, tmp_path, 2 * VOCAB_SIZE)
    checkpoints = tmp_path / "checkpoints"
    for later in range(step + 1, 10):
        shutil.rmtree(checkpoints / f"step_{later:08d}")
    (checkpoints / "latest").write_text(f"step_{step:08d}")
    before = records(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    run(workers, WORLD_SIZE, values, tmp_path)
    assert sorted(number for _, number in records(tmp_path)) == list(range(step + 1, 10))
    for key, line in records(tmp_path).items():
        assert line["loss"] == before[key]["loss"], key
    for name, tensor in weights(workers, tmp_path, 2 * VOCAB_SIZE).items():
        assert torch.equal(tensor, expected[name]), name


class SignalAt(Callback):
    """Sends this process a signal after a step, like a batch system."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, trainer: Any) -> None:
        if trainer.state.step == self._step and trainer.runtime.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def train_until_signal(values: dict[str, Any], directory: str, step: int) -> dict[str, Any]:
    from megatron_prealign.run.pretrain import pretrain

    state = pretrain(recipe_of(values, Path(directory)), leave_process_group=True, callbacks=[SignalAt(step)])
    return {"stopped": state.stop_requested, "step": state.step}


@pytest.mark.slow
def test_signal_on_one_rank_saves_and_ends_all_ranks(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(tiny, tmp_path, "fp32")
    values["checkpoint"] = {"keep": 1}
    ends = workers.run(2, train_until_signal, values, str(tmp_path), 6)
    assert ends[0] == ends[1]
    assert ends[0]["stopped"]
    # The flag is read one step after it was communicated.
    assert 7 <= ends[0]["step"] <= 8
    state = json.loads((tmp_path / "checkpoints" / f"step_{ends[0]['step']:08d}" / "state.json").read_text())
    assert state["train_state"]["step"] == ends[0]["step"]
    assert state["phase"] == "language_model"
    run(workers, 2, values, tmp_path)
    assert max(number for _, number in records(tmp_path)) == STEPS


def test_finished_run_does_nothing_more(workers: WorkerPool, tiny: Tiny, tmp_path: Path, uninterrupted: Any) -> None:
    directory, _ = uninterrupted("fp32")
    before = (directory / "metrics.jsonl").read_text()
    run(workers, WORLD_SIZE, values_for(tiny, directory, "fp32"), directory)
    assert (directory / "metrics.jsonl").read_text() == before


def test_checkpoint_of_another_model_is_refused(workers: WorkerPool, tiny: Tiny, uninterrupted: Any) -> None:
    directory, _ = uninterrupted("fp32")
    values = values_for(tiny, directory, "fp32")
    values["model"]["hidden_size"] = 64
    with pytest.raises(WorkerError) as caught:
        run(workers, WORLD_SIZE, values, directory)
    for kind, message, _ in caught.value.failures.values():
        assert kind == "UserError"
        assert "hidden_size 32 (recipe: 64)" in message
