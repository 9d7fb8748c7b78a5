"""A checkpoint of any layout loads in any other: bitwise equal state, and the same losses afterwards."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import slow_except
from support.tiny import VOCAB_SIZE, Tiny, recipe_of
from support.whole_runs import records
from support.workers import WorkerPool

from megatron_prealign.training.callbacks import Callback

SAVED_AT = 3
STEPS = 5
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2_sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "tp2_dp2": (4, {"tensor_model_parallel_size": 2}),
    "plain_dp2": (2, {"use_distributed_optimizer": False}),
    "plain_tp2": (2, {"use_distributed_optimizer": False, "tensor_model_parallel_size": 2}),
}
# Each layout is once the source and once the target.
MOVES = [
    ("one", "tp2_pp2"),
    ("tp2_pp2", "vpp2"),
    ("vpp2", "tp2_sp"),
    ("tp2_sp", "dp2"),
    ("dp2", "pp2"),
    ("pp2", "tp2_dp2"),
    ("tp2_dp2", "one"),
    ("plain_dp2", "plain_tp2"),
    ("plain_tp2", "plain_dp2"),
]
for place in (0, 1):
    assert sorted(move[place] for move in MOVES) == sorted(LAYOUTS)


def values_for(tiny: Tiny, directory: Path, layout: str) -> dict[str, Any]:
    """Language-model training with code-switching."""
    values = copy.deepcopy(tiny.values(directory))
    del values["alignment"]
    values["parallel"] = {"device": "cpu", **LAYOUTS[layout][1]}
    values["training"].update(train_iters=STEPS, eval_samples=2, retrieval_words=2)
    values["checkpoint"] = {"save_interval": SAVED_AT, "keep": 9}
    return values


class SaveAtStart(Callback):
    """Saves the loaded state to another directory before the first step."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def on_start(self, trainer: Any) -> None:
        from megatron_prealign.checkpoint.store import CheckpointStore

        recipe = replace(trainer.recipe, checkpoint=replace(trainer.recipe.checkpoint, directory=str(self._directory)))
        identity: dict[str, Any] = {"model": {}}
        store = CheckpointStore(recipe, trainer.runtime, identity=identity, run={}, huggingface={}, versions={})
        store.save(trainer.chunks, trainer.optimizer, trainer.state, phase="", consumed={}, blend={}, metrics={})
        store.finish()


def train_to_end(values: dict[str, Any], directory: str, again: str | None) -> int:
    """Runs in workers: trains to the end; saves the initial state to `again` first."""
    from megatron_prealign.run.pretrain import pretrain

    callbacks = [] if again is None else [SaveAtStart(Path(again))]
    return pretrain(recipe_of(values, Path(directory)), leave_process_group=True, callbacks=callbacks).step


def full_state(checkpoint: str) -> dict[str, Any]:
    """Runs in one worker: all full tensors of a checkpoint, without padding rows of the vocabulary, and the step
    counters of the optimizer."""
    from megatron.core import dist_checkpointing

    from megatron_prealign.runtime import cpu

    cpu.enable()
    tensors = dist_checkpointing.load_plain_tensors(checkpoint)
    common = dist_checkpointing.load_common_state_dict(checkpoint)
    groups = common["optimizer"]
    groups = groups.get("optimizer", groups)["param_groups"]
    full = {
        name: tensor[: 2 * VOCAB_SIZE] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }
    return {"tensors": full, "steps": sorted(int(group["step"]) for group in groups if "step" in group)}


@pytest.fixture(scope="module")
def trained(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Trains in a source layout, once."""

    @cache
    def run_of(layout: str) -> Path:
        directory = tmp_path_factory.mktemp(layout)
        workers.run(LAYOUTS[layout][0], train_to_end, values_for(tiny, directory, layout), str(directory), None)
        return directory

    return run_of


@pytest.mark.parametrize(
    ("source", "target"),
    slow_except(MOVES, ("vpp2", "tp2_sp")),
    ids=[f"{source}-{target}" for source, target in MOVES],
)
def test_layout_changes_nothing(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Callable[[str], Path], source: str, target: str
) -> None:
    name = f"step_{SAVED_AT:08d}"
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(trained(source) / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest").write_text(name)
    again = tmp_path / "again"
    world_size = LAYOUTS[target][0]
    workers.run(world_size, train_to_end, values_for(tiny, tmp_path, target), str(tmp_path), str(again))
    before = workers.run(1, full_state, str(checkpoints / name))[0]
    after = workers.run(1, full_state, str(again / name))[0]
    tensors = {key: value for key, value in before["tensors"].items() if not key.startswith("random_state")}
    assert sum(".exp_avg." in key for key in tensors) == sum(".exp_avg_sq." in key for key in tensors) > 8
    assert tensors.keys() == {key for key in after["tensors"] if not key.startswith("random_state")}
    for key, tensor in tensors.items():
        assert tensor.dtype == after["tensors"][key].dtype
        assert torch.equal(tensor, after["tensors"][key]), key
    assert before["steps"] == after["steps"] and set(before["steps"]) == {SAVED_AT}
    expected, got = records(trained(source)), records(tmp_path)
    assert [step for _, step in got] == list(range(SAVED_AT + 1, STEPS + 1))
    for step, line in got.items():
        for metric in ("loss", "grad_norm"):
            # Another layout sums in another order: fp32 rounding over two steps.
            assert line[metric] == pytest.approx(expected[step][metric], rel=1e-5), (step, metric)
        # Switching is decided in integer arithmetic.
        assert line["switched_words"] == expected[step]["switched_words"]
    state = json.loads((checkpoints / f"step_{STEPS:08d}" / "state.json").read_text())
    saved = json.loads((trained(source) / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
    assert state["blend"] == saved["blend"] and state["layout"] != saved["layout"]
