"""Where a run starts: before a corrupt checkpoint, from another run, with other weights, data or batch size."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import assert_facts
from support.tiny import VOCAB_SIZE, Tiny
from support.whole_runs import records, refusal, reseal, run, train, weights
from support.workers import WorkerPool

from megatron_prealign.errors import UserError

STEPS = 5


def values_for(tiny: Tiny, directory: Path, **checkpoint: Any) -> dict[str, Any]:
    """Language-model training with dropout, so that random states matter."""
    values = copy.deepcopy(tiny.values(directory))
    del values["alignment"]
    values["model"].update(hidden_dropout=0.1)
    values["parallel"] = {"device": "cpu"}
    values["training"].update(eval_samples=2, retrieval_words=2, train_iters=STEPS)
    values["checkpoint"] = {"save_interval": 1, "keep": 9, **checkpoint}
    return values


@pytest.fixture(scope="module")
def trained(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes with a checkpoint after every step. Tests copy it."""
    directory = tmp_path_factory.mktemp("trained")
    run(workers, 2, values_for(tiny, directory), directory)
    return directory


@pytest.fixture(scope="module")
def expected(workers: WorkerPool, trained: Path) -> dict[str, torch.Tensor]:
    return weights(workers, trained, 2 * VOCAB_SIZE)


def copied(trained: Path, directory: Path, newest: int) -> Path:
    """Copies the checkpoints up to step `newest`; returns their directory."""
    checkpoints = directory / "checkpoints"
    for step in range(1, newest + 1):
        shutil.copytree(trained / "checkpoints" / f"step_{step:08d}", checkpoints / f"step_{step:08d}")
    (checkpoints / "latest").write_text(f"step_{newest:08d}\n")
    return checkpoints


def flip_a_bit(checkpoint: Path) -> str:
    """Corrupts the largest file without changing its size; returns its name."""
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file.name


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_older_checkpoint_is_used_if_the_newest_is_corrupt(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path, expected: dict[str, torch.Tensor]
) -> None:
    checkpoints = copied(trained, tmp_path, newest=4)
    file = flip_a_bit(checkpoints / "step_00000004")
    shutil.rmtree(checkpoints / "step_00000003" / "tokenizer")
    before = sorted(path.name for path in checkpoints.iterdir())
    message = refusal(workers, train, values_for(tiny, tmp_path, on_damage="fail"), str(tmp_path))
    facts = (f"{file} does not match its checksum", "checkpoint.on_damage", "fall_back")
    assert_facts(message, checkpoints / "step_00000004", *facts)
    # A refused run renames nothing.
    other = values_for(tiny, tmp_path)
    other["training"]["seed"] = 4
    assert "training.seed 3 (recipe: 4)" in refusal(workers, train, other, str(tmp_path))
    assert sorted(path.name for path in checkpoints.iterdir() if path.name[0] != ".") == before
    run(workers, 2, values_for(tiny, tmp_path), tmp_path)
    assert [step for _, step in records(tmp_path)] == [3, 4, 5]
    assert_equal(weights(workers, tmp_path, 2 * VOCAB_SIZE), expected)
    assert sorted(path.name for path in checkpoints.iterdir() if path.name[0] != ".") == [
        "latest",
        "step_00000001",
        "step_00000002",
        "step_00000003",
        "step_00000003.damaged",
        "step_00000004",
        "step_00000004.damaged",
        "step_00000005",
    ]


def is_agreed(values: dict[str, Any], directory: str) -> bool:
    """Runs in workers: whether rank 0 reports the error for all ranks."""
    with pytest.raises(UserError) as caught:
        train(values, directory)
    return caught.value.agreed


def test_refusal_of_a_checkpoint_is_reported_once(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path
) -> None:
    flip_a_bit(copied(trained, tmp_path, newest=1) / "step_00000001")
    assert workers.run(2, is_agreed, values_for(tiny, tmp_path), str(tmp_path)) == [True, True]


def test_only_corrupt_checkpoints_do_not_start_from_scratch(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path
) -> None:
    checkpoints = copied(trained, tmp_path, newest=2)
    for step in (1, 2):
        (checkpoints / f"step_{step:08d}" / "common.pt").unlink()
    message = refusal(workers, train, values_for(tiny, tmp_path), str(tmp_path))
    problem = "common.pt is missing"
    facts = (f"step_00000002: {problem}", f"step_00000001: {problem}", "checkpoint.directory")
    assert_facts(message, checkpoints, *facts)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
def test_another_run_continues_in_a_new_directory(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path, expected: dict[str, torch.Tensor]
) -> None:
    source = trained / "checkpoints" / "step_00000003"
    before = sorted(path.name for path in (trained / "checkpoints").iterdir())
    values = values_for(tiny, tmp_path, load=str(source), load_parts="all")
    run(workers, 2, values, tmp_path)
    assert [step for _, step in records(tmp_path)] == [4, 5]
    assert_equal(weights(workers, tmp_path, 2 * VOCAB_SIZE), expected)
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == before
    # Then it resumes from its own checkpoint.
    values["training"]["train_iters"] = STEPS + 1
    run(workers, 2, values, tmp_path)
    assert [step for _, step in records(tmp_path)] == [4, 5, 6]
    # The same differences are refused as for a resume.
    other = values_for(tiny, tmp_path / "other", load=str(source), load_parts="all")
    other["training"]["precision"] = "bf16"
    assert "training.precision fp32 (recipe: bf16)" in refusal(workers, train, other, str(tmp_path / "other"))


@pytest.mark.slow
def test_weights_load_into_a_vocabulary_with_different_padding(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path, expected: dict[str, torch.Tensor]
) -> None:
    """Saved with 1,032 rows for 1,024 ids, loaded with 1,056 over two ranks and with 1,200 in one."""
    for number, (world_size, parallel, divisor) in enumerate(
        [(2, {"tensor_model_parallel_size": 2}, 24), (1, {}, 400)]
    ):
        directory = tmp_path / str(number)
        values = values_for(tiny, directory, load=str(trained))
        values["model"].update(make_vocab_size_divisible_by=divisor, hidden_dropout=0.0)
        values["parallel"].update(parallel)
        values["training"].update(train_iters=1)
        values["optimizer"] = {"lr": 1e-12}
        run(workers, world_size, values, directory)
        loaded = weights(workers, directory, 2 * VOCAB_SIZE)
        for name, tensor in expected.items():
            # With this learning rate a weight changes by at most 1e-12.
            torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=1e-9)


def test_mismatched_tensors_are_listed(workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    """A checkpoint whose state.json describes this model and whose tensors are of another one."""
    checkpoints = copied(trained, tmp_path / "source", newest=1)
    state = json.loads((checkpoints / "step_00000001" / "state.json").read_text())
    values = values_for(tiny, tmp_path, load=str(checkpoints))
    values["model"].update(family="qwen3", ffn_hidden_size=64)
    state["model"].update(values["model"], kv_channels=None)
    (checkpoints / "step_00000001" / "state.json").write_text(json.dumps(state))
    reseal(checkpoints / "step_00000001")
    message = refusal(workers, train, values, str(tmp_path))
    assert_facts(
        message,
        checkpoints / "step_00000001",
        "decoder.layers.self_attention.k_layernorm.weight is missing, "
        "decoder.layers.self_attention.q_layernorm.weight is missing, "
        "decoder.layers.mlp.linear_fc1.weight is [4, ",
        "checkpoint.load",
    )


@pytest.mark.slow
def test_blend_and_batch_size_change_between_resumes(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path
) -> None:
    checkpoints = copied(trained, tmp_path, newest=3)
    saved = json.loads((checkpoints / "step_00000003" / "state.json").read_text())
    values = values_for(tiny, tmp_path)
    for source in values["data"]["sources"]:
        source["weight"] = 0.5
    values["training"].update(global_batch_size=16, train_iters=STEPS + 1)
    run(workers, 1, values, tmp_path)
    state = json.loads((checkpoints / "step_00000006" / "state.json").read_text())
    assert state["train_state"]["consumed_samples"] == 3 * 8 + 3 * 16
    before, after = saved["consumed_samples_per_source"], state["consumed_samples_per_source"]
    # Each source gives half of the 48 samples after the change.
    assert after == {path: count + 24 for path, count in before.items()}
    assert state["blend"]["start"] == 24
    assert list(state["blend"]["consumed_at_start"].values()) == list(before.values())
    # A resume after the change has the same order: it ends bitwise equal to the uninterrupted run.
    expected = weights(workers, tmp_path, 2 * VOCAB_SIZE)
    for step in (5, 6):
        shutil.rmtree(checkpoints / f"step_{step:08d}")
    (checkpoints / "latest").write_text("step_00000004\n")
    run(workers, 1, values, tmp_path)
    assert_equal(weights(workers, tmp_path, 2 * VOCAB_SIZE), expected)
    # A run shorter than what is done is refused.
    values["training"]["train_iters"] = 2
    message = refusal(workers, train, values, str(tmp_path))
    assert_facts(message, checkpoints, "training.train_iters is 2", "6 are already done")


@pytest.mark.slow
def test_a_checkpoint_of_weights_cannot_be_resumed(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path
) -> None:
    checkpoints = copied(trained, tmp_path / "source", newest=1)
    file = checkpoints / "step_00000001" / "state.json"
    state = json.loads(file.read_text())
    names = ("vocab_size", "padded_vocab_size", "tokenizer_fingerprint", "model", "layout")
    file.write_text(json.dumps({"kind": "weights", "source": {}, **{name: state[name] for name in names}}))
    reseal(checkpoints / "step_00000001")
    values = values_for(tiny, tmp_path, load=str(checkpoints), load_parts="all")
    message = refusal(workers, train, values, str(tmp_path))
    assert_facts(message, checkpoints / "step_00000001", "only weights", "checkpoint.load_parts")
    values["checkpoint"]["load_parts"] = "weights"
    values["training"]["train_iters"] = 2
    run(workers, 2, values, tmp_path)
    assert [step for _, step in records(tmp_path)] == [1, 2]


def verify_on_another_disk(directory: str, problem: str) -> None:
    """Runs in workers: verifies a checkpoint; rank 1 finds a problem that rank 0 does not."""
    import torch.distributed as dist

    from megatron_prealign.checkpoint.resume import agree
    from megatron_prealign.recipe import CheckpointSection

    real = agree.find_damage
    if dist.get_rank() == 1:
        agree.find_damage = lambda *_, **__: [problem]
    try:
        agree.require_intact(Path(directory), CheckpointSection())
    finally:
        agree.find_damage = real


def test_a_file_missing_on_one_rank_only_is_no_corruption(workers: WorkerPool, trained: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_00000001"
    message = refusal(workers, verify_on_another_disk, str(checkpoint), ".metadata is missing")
    assert_facts(message, checkpoint, "rank 1", "rank 0", ".metadata is missing", "checkpoint.directory")
    problem = "common.pt does not match its checksum"
    message = refusal(workers, verify_on_another_disk, str(checkpoint), problem)
    assert_facts(message, f"{checkpoint} is corrupt", problem)
    assert "rank 1" not in message
