"""The alignment phase with half of the blocks frozen and with projection heads: changed parameters, and resuming."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import slow_except
from support.messages import assert_facts
from support.tiny import VOCAB_SIZE, Tiny
from support.whole_runs import records, run, weights
from support.workers import WorkerError, WorkerPool

ALIGNMENT_STEPS, STEPS = 3, 5
# fp32 sums in another order, three steps of Adam at lr 1e-3.
TOLERANCE = 1e-4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
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


# The upper half only in one process, since marking on a rank does not depend on the half.
@pytest.mark.parametrize(
    ("freeze", "layout"),
    slow_except([("upper", "one"), *[("lower", layout) for layout in LAYOUTS]], ("lower", "one")),
)
def test_half_of_the_blocks_stays_bit_for_bit(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, freeze: str, layout: str
) -> None:
    free = {2, 3} if freeze == "lower" else {0, 1}
    world_size, parallel = LAYOUTS[layout]
    run(workers, world_size, values_for(tiny, tmp_path, parallel, freeze=freeze), tmp_path)
    first, last, end = (
        weights(workers, tmp_path, 2 * VOCAB_SIZE, f"step_{step:08d}") for step in (1, ALIGNMENT_STEPS, STEPS)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "layers"),
    [({}, "all"), ({"pipeline_model_parallel_size": 2}, [4, 5])],
    # In the second case the first stage has no head.
    ids=["dp2", "pp2_heads_on_the_last_stage"],
)
def test_frozen_run_resumes_where_it_stopped(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, parallel: dict[str, Any], layers: Any
) -> None:
    values = values_for(tiny, tmp_path / "uninterrupted", parallel, freeze="lower", projection_size=8, layers=layers)
    run(workers, 2, values, tmp_path / "uninterrupted")
    for step in (2, 4):
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


@pytest.fixture(scope="module")
def frozen_run(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Recipe values of a run with frozen blocks and projection heads."""
    directory = tmp_path_factory.mktemp("frozen")
    values = values_for(tiny, directory, {}, freeze="lower", projection_size=8)
    run(workers, 1, values, directory)
    return values


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "field", "current"),
    [
        ({"freeze": "upper"}, "alignment.freeze lower", "upper"),
        (
            {"projection_size": 16},
            "alignment.projection_size and layers",
            "{'size': 16, 'layers': [0, 1, 2, 3, 4, 5]}",
        ),
        ({"layers": [0, 1]}, "alignment.projection_size and layers", "{'size': 8, 'layers': [0, 1]}"),
    ],
)
def test_resuming_with_another_setting_is_rejected(
    workers: WorkerPool, frozen_run: dict[str, Any], tmp_path: Path, change: dict[str, Any], field: str, current: str
) -> None:
    values = copy.deepcopy(frozen_run)
    values["alignment"].update(change)
    with pytest.raises(WorkerError) as caught:
        run(workers, 1, values, tmp_path)
    kind, message, _ = caught.value.failures[0]
    assert kind == "UserError"
    assert_facts(message, field, f"(recipe: {current})")


HEADS: dict[str, Any] = {"projection_size": 8, "layers": [0, 2, 4, 5]}


@pytest.fixture(scope="module")
def heads_of_one_process(
    workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], dict[str, Any]]:
    directory = tmp_path_factory.mktemp("heads")
    run(workers, 1, values_for(tiny, directory / "one", {}, **HEADS), directory / "one")
    plain = values_for(tiny, directory / "plain", {}, **{**HEADS, "projection_size": None})
    run(workers, 1, plain, directory / "plain")
    expected, first = records(directory / "one"), ("alignment", 1)
    without = records(directory / "plain")[first]["alignment_loss"][0]
    assert expected[first]["alignment_loss"][0] != pytest.approx(without, rel=1e-2)
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp2_pp2", "dp2_plain"])
def test_heads_are_the_same_in_every_layout(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, heads_of_one_process: dict[Any, Any], layout: str
) -> None:
    """Losses of later steps depend on heads that earlier steps have updated."""
    world_size, parallel = LAYOUTS[layout]
    run(workers, world_size, values_for(tiny, tmp_path, parallel, **HEADS), tmp_path)
    lines = {key: line for key, line in records(tmp_path).items() if line["phase"] == "alignment"}
    assert len(lines) == ALIGNMENT_STEPS
    for key, line in lines.items():
        got, reference = (
            [loss for loss in each["alignment_loss"] if loss is not None] for each in (line, heads_of_one_process[key])
        )
        assert len(reference) == 4
        assert got == pytest.approx(reference, rel=TOLERANCE), key
