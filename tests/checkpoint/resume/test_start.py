"""Where a run starts: behind a damaged checkpoint, at another run's, with other weights, data or batch size."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
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
    """A run on two processes with a checkpoint of every step. Tests copy it."""
    directory = tmp_path_factory.mktemp("trained")
    run(workers, 2, values_for(tiny, directory), directory)
    return directory


@pytest.fixture(scope="module")
def expected(workers: WorkerPool, trained: Path) -> dict[str, torch.Tensor]:
    return weights(workers, trained, 2 * VOCAB_SIZE)


def copied(trained: Path, directory: Path, newest: int) -> Path:
    """The checkpoints as they were after step `newest`; returns their directory."""
    checkpoints = directory / "checkpoints"
    for step in range(1, newest + 1):
        shutil.copytree(trained / "checkpoints" / f"step_{step:08d}", checkpoints / f"step_{step:08d}")
    (checkpoints / "latest").write_text(f"step_{newest:08d}\n")
    return checkpoints


def flip_a_bit(checkpoint: Path) -> str:
    """Damages the largest file, whose size stays; returns its name."""
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return file.name


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_damaged_newest_is_left_for_the_one_before(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path, expected: dict[str, torch.Tensor]
) -> None:
    checkpoints = copied(trained, tmp_path, newest=4)
    file = flip_a_bit(checkpoints / "step_00000004")
    shutil.rmtree(checkpoints / "step_00000003" / "tokenizer")
    before = sorted(path.name for path in checkpoints.iterdir())
    message = refusal(workers, train, values_for(tiny, tmp_path, on_damage="fail"), str(tmp_path))
    assert message == (
        f"{checkpoints / 'step_00000004'} is damaged: {file} has another checksum than when it was written; restore "
        "it, or go on from an older checkpoint with checkpoint.on_damage fall_back"
    )
    # A run that is refused sets nothing aside.
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
    """Runs in workers: whether the first process tells of a refusal for all."""
    with pytest.raises(UserError) as caught:
        train(values, directory)
    return caught.value.agreed


def test_refusal_of_a_checkpoint_is_told_once(workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    flip_a_bit(copied(trained, tmp_path, newest=1) / "step_00000001")
    assert workers.run(2, is_agreed, values_for(tiny, tmp_path), str(tmp_path)) == [True, True]


def test_no_good_one_left_does_not_begin_anew(workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    checkpoints = copied(trained, tmp_path, newest=2)
    for step in (1, 2):
        (checkpoints / f"step_{step:08d}" / "common.pt").unlink()
    message = refusal(workers, train, values_for(tiny, tmp_path), str(tmp_path))
    assert message.startswith(
        f"{checkpoints} holds no good checkpoint (step_00000002: common.pt is missing; step_00000001: common.pt is "
        "missing); restore a checkpoint, or set checkpoint.directory"
    )
    assert not (tmp_path / "metrics.jsonl").exists()


def test_all_of_another_run_goes_on_in_a_directory_of_its_own(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path, expected: dict[str, torch.Tensor]
) -> None:
    source = trained / "checkpoints" / "step_00000003"
    before = sorted(path.name for path in (trained / "checkpoints").iterdir())
    values = values_for(tiny, tmp_path, load=str(source), load_parts="all")
    run(workers, 2, values, tmp_path)
    assert [step for _, step in records(tmp_path)] == [4, 5]
    assert_equal(weights(workers, tmp_path, 2 * VOCAB_SIZE), expected)
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == before
    # Now it resumes from its own.
    values["training"]["train_iters"] = STEPS + 1
    run(workers, 2, values, tmp_path)
    assert [step for _, step in records(tmp_path)] == [4, 5, 6]
    # What a resume refuses, this does too.
    other = values_for(tiny, tmp_path / "other", load=str(source), load_parts="all")
    other["training"]["precision"] = "bf16"
    assert "training.precision fp32 (recipe: bf16)" in refusal(workers, train, other, str(tmp_path / "other"))


def test_weights_move_to_a_vocabulary_with_other_padding(
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
        found = weights(workers, directory, 2 * VOCAB_SIZE)
        for name, tensor in expected.items():
            # The rate moves a weight by 1e-12 at most.
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-9)


def test_tensors_that_do_not_fit_are_named(workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    """A checkpoint that says it is of this model and holds the tensors of another one."""
    checkpoints = copied(trained, tmp_path / "source", newest=1)
    state = json.loads((checkpoints / "step_00000001" / "state.json").read_text())
    values = values_for(tiny, tmp_path, load=str(checkpoints))
    values["model"].update(family="qwen3", ffn_hidden_size=64)
    state["model"].update(values["model"], kv_channels=None)
    (checkpoints / "step_00000001" / "state.json").write_text(json.dumps(state))
    reseal(checkpoints / "step_00000001")
    message = refusal(workers, train, values, str(tmp_path))
    assert message.startswith(
        f"{checkpoints / 'step_00000001'} does not have the tensors of the model: "
        "decoder.layers.self_attention.k_layernorm.weight is missing, "
        "decoder.layers.self_attention.q_layernorm.weight is missing, "
        "decoder.layers.mlp.linear_fc1.weight is [4, "
    )
    assert message.endswith("name another checkpoint in checkpoint.load")


def test_blend_and_batch_size_change_while_the_run_goes_on(
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
    # Half of the 48 rows behind the change for each source.
    assert after == {path: count + 24 for path, count in before.items()}
    assert state["blend"]["start"] == 24
    assert list(state["blend"]["consumed_at_start"].values()) == list(before.values())
    # A resume behind the change finds the same order: it ends where the run that was not stopped ended.
    expected = weights(workers, tmp_path, 2 * VOCAB_SIZE)
    for step in (5, 6):
        shutil.rmtree(checkpoints / f"step_{step:08d}")
    (checkpoints / "latest").write_text("step_00000004\n")
    run(workers, 1, values, tmp_path)
    assert_equal(weights(workers, tmp_path, 2 * VOCAB_SIZE), expected)
    # A shorter run than what is done is refused.
    values["training"]["train_iters"] = 2
    assert "training.train_iters is 2, of which 6 are done" in refusal(workers, train, values, str(tmp_path))


def test_a_kind_of_checkpoint_without_a_run_gives_its_weights_alone(
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
    assert message.startswith(f"{checkpoints / 'step_00000001'} holds weights alone, a run cannot go on from it")
    values["checkpoint"]["load_parts"] = "weights"
    values["training"]["train_iters"] = 2
    run(workers, 2, values, tmp_path)
    assert [step for _, step in records(tmp_path)] == [1, 2]


def look_with_another_disk(directory: str, problem: str) -> None:
    """Runs in workers: verifies a checkpoint, of whose files rank 1 sees something else than rank 0."""
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


def test_what_one_process_alone_does_not_see_is_no_damage(workers: WorkerPool, trained: Path) -> None:
    checkpoint = trained / "checkpoints" / "step_00000001"
    assert refusal(workers, look_with_another_disk, str(checkpoint), ".metadata is missing") == (
        f"{checkpoint}: process 1 does not see files that process 0 sees (.metadata is missing); checkpoint.directory "
        "must lie on a disk that all nodes share"
    )
    assert refusal(workers, look_with_another_disk, str(checkpoint), "common.pt has another checksum") == (
        f"{checkpoint} is damaged: common.pt has another checksum; restore it, or name another checkpoint"
    )
