"""The alignment phase with half of the blocks frozen and with projection heads: changed parameters, and resuming."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import assert_facts
from support.tiny import VOCAB_SIZE, Tiny
from support.whole_runs import records, run, weights
from support.workers import WorkerError, WorkerPool

ALIGNMENT_STEPS, STEPS = 3, 5
# fp32 sums in another order, three steps of Adam at lr 1e-3.
TOLERANCE = 1e-4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2_pp2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "dp2_plain": (2, {"use_distributed_optimizer": False}),
    "dp2_overlap": (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}


def values_for(tiny: Tiny, directory: Path, parallel: dict[str, Any], **alignment: Any) -> dict[str, Any]:
    values = copy.deepcopy(tiny.values(directory))
    values["alignment"].update(train_iters=ALIGNMENT_STEPS, **alignment)
    values["training"].update(train_iters=STEPS - ALIGNMENT_STEPS, eval_samples=2, retrieval_words=2)
    values["parallel"] = {"device": "cpu", **parallel}
    values["optimizer"]["weight_decay"] = 0.1
    values["checkpoint"] = {"save_interval": 1, "keep": 100}
    return values


def changed_blocks(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, set[int]]:
    """Maps every parameter to the blocks in which it changed; -1 if it belongs to no block.

    A checkpoint stores a parameter of all blocks as one tensor, with the block as its first dimension.
    """
    changed = {}
    for name, tensor in before.items():
        differ = after[name] != tensor
        blocks = {index for index in range(len(tensor)) if differ[index].any()}
        changed[name] = blocks if ".layers." in name else {-1} if differ.any() else set()
    return changed


def assert_only_these_changed(workers: WorkerPool, directory: Path, free: set[int]) -> None:
    """Checks that the alignment phase changed these blocks and what belongs to no block, and the next phase all."""
    first, last, end = (
        weights(workers, directory, 2 * VOCAB_SIZE, f"step_{step:08d}") for step in (1, ALIGNMENT_STEPS, STEPS)
    )
    in_phase, later = changed_blocks(first, last), changed_blocks(last, end)
    assert any(".layers." in name for name in in_phase)
    for name, blocks in in_phase.items():
        if ".layers." in name:
            assert blocks <= free, name
        else:
            assert blocks == {-1}, name
    assert set().union(*(blocks for name, blocks in in_phase.items() if ".layers." in name)) == free
    assert set().union(*(blocks for name, blocks in later.items() if ".layers." in name)) == {0, 1, 2, 3}


# Only in one process, since marking on a rank does not depend on the half.
@pytest.mark.slow
def test_the_upper_half_stays_bit_for_bit(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    run(workers, 1, values_for(tiny, tmp_path, {}, freeze="upper"), tmp_path)
    assert_only_these_changed(workers, tmp_path, {0, 1})


HEADS: dict[str, Any] = {"freeze": "lower", "projection_size": 8, "layers": [0, 2, 4, 5]}


@pytest.fixture(scope="module")
def one(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Recipe values of a run of one process with the lower half frozen and with projection heads."""
    values = values_for(tiny, tmp_path_factory.mktemp("one"), {}, **HEADS)
    run(workers, 1, values, run_dir_of(values))
    return values


def run_dir_of(values: dict[str, Any]) -> Path:
    return Path(values["logging"]["run_dir"])


def test_the_lower_half_stays_bit_for_bit(workers: WorkerPool, one: dict[str, Any]) -> None:
    assert_only_these_changed(workers, run_dir_of(one), {2, 3})


@pytest.mark.slow
def test_the_loss_is_that_of_the_heads(workers: WorkerPool, tiny: Tiny, tmp_path: Path, one: dict[str, Any]) -> None:
    values = values_for(tiny, tmp_path, {}, **{**HEADS, "projection_size": None})
    values["alignment"]["train_iters"] = 1
    run(workers, 1, values, tmp_path)
    first = ("alignment", 1)
    with_heads, without = (records(each)[first]["alignment_loss"][0] for each in (run_dir_of(one), tmp_path))
    assert with_heads != pytest.approx(without, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(workers: WorkerPool, tiny: Tiny, tmp_path: Path, one: dict[str, Any], layout: str) -> None:
    """Losses of later steps depend on heads that earlier steps have updated."""
    world_size, parallel = LAYOUTS[layout]
    run(workers, world_size, values_for(tiny, tmp_path, parallel, **HEADS), tmp_path)
    assert_only_these_changed(workers, tmp_path, {2, 3})
    expected = records(run_dir_of(one))
    lines = {key: line for key, line in records(tmp_path).items() if line["phase"] == "alignment"}
    assert len(lines) == ALIGNMENT_STEPS
    for key, line in lines.items():
        got, reference = (
            [loss for loss in each["alignment_loss"] if loss is not None] for each in (line, expected[key])
        )
        assert len(reference) == 4
        assert got == pytest.approx(reference, rel=TOLERANCE), key


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "layers", "steps"),
    [({}, "all", (2, 4)), ({"pipeline_model_parallel_size": 2}, [4, 5], (2,))],
    # In the second case the first stage has no head.
    ids=["dp2", "pp2_heads_on_the_last_stage"],
)
def test_frozen_run_resumes_where_it_stopped(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, parallel: dict[str, Any], layers: Any, steps: tuple[int, ...]
) -> None:
    values = values_for(tiny, tmp_path / "uninterrupted", parallel, freeze="lower", projection_size=8, layers=layers)
    run(workers, 2, values, tmp_path / "uninterrupted")
    end = weights(workers, tmp_path / "uninterrupted", 2 * VOCAB_SIZE)
    assert any(name.startswith("projection_heads.") for name in end)
    for step in steps:
        directory = tmp_path / f"from_{step}"
        (directory / "checkpoints").mkdir(parents=True)
        name = f"step_{step:08d}"
        shutil.copytree(tmp_path / "uninterrupted" / "checkpoints" / name, directory / "checkpoints" / name)
        (directory / "checkpoints" / "latest").write_text(name)
        values["logging"]["run_dir"] = str(directory)
        run(workers, 2, values, directory)
        got, expected = records(directory), records(tmp_path / "uninterrupted")
        assert len(got) == STEPS - step
        for key, line in got.items():
            for value in ("loss", "grad_norm", "alignment_loss"):
                assert line.get(value) == expected[key].get(value), (key, value)
        # An alignment guard would still use the heads, whose losses the last phase does not report here.
        for tensor_name, tensor in weights(workers, directory, 2 * VOCAB_SIZE).items():
            assert torch.equal(tensor, end[tensor_name]), tensor_name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "field", "current"),
    [
        ({"freeze": "upper"}, "alignment.freeze lower", "upper"),
        (
            {"projection_size": 16},
            "alignment.projection_size and layers",
            "{'size': 16, 'layers': [0, 2, 4, 5]}",
        ),
        ({"layers": [0, 1]}, "alignment.projection_size and layers", "{'size': 8, 'layers': [0, 1]}"),
    ],
)
def test_resuming_with_another_setting_is_rejected(
    workers: WorkerPool, one: dict[str, Any], tmp_path: Path, change: dict[str, Any], field: str, current: str
) -> None:
    values = copy.deepcopy(one)
    values["alignment"].update(change)
    with pytest.raises(WorkerError) as caught:
        run(workers, 1, values, tmp_path)
    kind, message, _ = caught.value.failures[0]
    assert kind == "UserError"
    assert_facts(message, field, f"(recipe: {current})")
