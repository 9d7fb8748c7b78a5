"""Saving checkpoints: their content, retention, and failed or interrupted saves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import slow_except
from support.messages import assert_facts
from support.tiny import VOCAB_SIZE, Tiny, recipe_of
from support.whole_runs import language_model_values, records, reseal, run, steps_in, user_error_message, weights
from support.workers import WorkerError, WorkerPool


@pytest.fixture(scope="module")
def trained(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes with a checkpoint after every step. Tests copy it."""
    directory = tmp_path_factory.mktemp("trained")
    run(workers, 2, language_model_values(tiny, directory, save_interval=1, keep=100), directory)
    return directory


def copied(trained: Path, directory: Path, newest: int | None = None) -> Path:
    """Copies the run, without checkpoints after step `newest`."""
    shutil.copytree(trained, directory, dirs_exist_ok=True)
    if newest is not None:
        for step in range(newest + 1, 6):
            shutil.rmtree(directory / "checkpoints" / f"step_{step:08d}")
        (directory / "checkpoints" / "latest").write_text(f"step_{newest:08d}\n")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("keep", slow_except([1, 2], 2))
def test_only_the_newest_are_kept(workers: WorkerPool, tiny: Tiny, tmp_path: Path, keep: int) -> None:
    run(workers, 1, language_model_values(tiny, tmp_path, save_interval=1, keep=keep), tmp_path)
    assert steps_in(tmp_path) == ["latest", *(f"step_{step:08d}" for step in range(6 - keep, 6))]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000005"


def test_without_an_interval_only_the_end_is_saved(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = language_model_values(tiny, tmp_path, directory=str(tmp_path / "elsewhere"))
    run(workers, 1, values, tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert sorted(path.name for path in (tmp_path / "elsewhere").iterdir()) == ["latest", "step_00000005"]


def test_content_of_a_checkpoint(trained: Path, tiny: Tiny) -> None:
    checkpoint = trained / "checkpoints" / "step_00000003"
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["train_state"]["step"] == 3
    assert state["train_state"]["consumed_samples"] == 24
    assert state["phase"] == "language_model"
    assert state["layout"]["data_parallel_size"] == 2
    assert state["vocab_size"] == 2 * VOCAB_SIZE
    # The 24 samples so far, over all sources.
    assert sum(state["consumed_samples_per_source"].values()) == 24
    assert [source["segmenter"] for source in state["run"]["sources"]] == [None, None]
    assert list(state["consumed_samples_per_source"]) == [str(tiny.directory / "en"), str(tiny.directory / "en_clone")]
    assert (checkpoint / "recipe.yaml").exists()
    files = {file for file in Path(tiny.tokenizer).iterdir() if file.name != "fertility.json"}
    assert len(files) > 2
    for file in files:
        assert (checkpoint / "tokenizer" / file.name).read_bytes() == file.read_bytes()


def resume_only(values: dict[str, Any], directory: str) -> None:
    """Runs in workers: `pretrain`, which must fail."""
    from megatron_prealign.run.pretrain import pretrain

    pretrain(recipe_of(values, Path(directory)), leave_process_group=True)


def test_checkpoint_of_another_tokenizer_is_refused(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path
) -> None:
    copied(trained, tmp_path, newest=2)
    path = tmp_path / "checkpoints" / "step_00000002" / "state.json"
    state = json.loads(path.read_text())
    state["tokenizer_fingerprint"] = "sha256:other"
    path.write_text(json.dumps(state))
    reseal(path.parent)
    with pytest.raises(WorkerError) as caught:
        workers.run(1, resume_only, language_model_values(tiny, tmp_path), str(tmp_path))
    assert_facts(user_error_message(caught), path.parent, "tokenizer sha256:other (recipe: sha256:")


@pytest.mark.slow
def test_unfinished_directories_are_ignored(workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path) -> None:
    copied(trained, tmp_path, newest=3)
    checkpoints = tmp_path / "checkpoints"
    # Left by killed saves: of the next step, and of a much later one.
    for name in (".step_00000004.incomplete", ".step_00000099.incomplete"):
        shutil.copytree(checkpoints / "step_00000003", checkpoints / name)
    (tmp_path / "metrics.jsonl").unlink()
    run(workers, 2, language_model_values(tiny, tmp_path, save_interval=1, keep=2), tmp_path)
    assert [step for _, step in records(tmp_path)] == [4, 5]
    assert [name for name in steps_in(tmp_path) if name.startswith("step")] == ["step_00000004", "step_00000005"]
    expected = weights(workers, trained, 2 * VOCAB_SIZE)
    for name, tensor in weights(workers, tmp_path, 2 * VOCAB_SIZE).items():
        assert torch.equal(tensor, expected[name]), name


def run_until_the_disk_is_full(values: dict[str, Any], directory: str, step: int) -> None:
    """Runs in workers: rank 1 cannot write the tensors of `step`."""
    import torch.distributed as dist

    from megatron_prealign.checkpoint.sharded import save as sharded_save
    from megatron_prealign.run.pretrain import pretrain

    real = sharded_save._write_file

    def write(directory: Path, file: Any) -> Any:
        if f"step_{step:08d}" in directory.name and dist.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return real(directory, file)

    sharded_save._write_file = write
    try:
        pretrain(recipe_of(values, Path(directory)), leave_process_group=True)
    finally:
        sharded_save._write_file = real


@pytest.mark.slow
def test_failed_save_keeps_the_previous_checkpoint(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path
) -> None:
    values = language_model_values(tiny, tmp_path, save_interval=1, keep=1)
    with pytest.raises(WorkerError) as caught:
        workers.run(2, run_until_the_disk_is_full, values, str(tmp_path), 3, timeout_s=60)
    facts = ("No space left on device", "step_00000002", "checkpoint.directory")
    assert_facts(user_error_message(caught), tmp_path / "checkpoints" / "step_00000003", *facts)
    assert steps_in(tmp_path) == [".step_00000003.incomplete", "latest", "step_00000002"]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "step_00000002"
    # With free space the same command resumes, and ends bitwise equal to the run that never failed.
    run(workers, 2, values, tmp_path)
    assert steps_in(tmp_path) == ["latest", "step_00000005"]
    expected = weights(workers, trained, 2 * VOCAB_SIZE)
    for name, tensor in weights(workers, tmp_path, 2 * VOCAB_SIZE).items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_start_from_the_weights_of_another_run(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path, precision: str
) -> None:
    """One step with a tiny learning rate shows the initial weights, master weights included."""
    values = language_model_values(tiny, tmp_path, load=str(trained))
    values["training"].update(train_iters=1, seed=77, precision=precision)
    values["optimizer"] = {"lr": 1e-12}
    run(workers, 1, values, tmp_path)
    assert [step for _, step in records(tmp_path)] == [1]
    expected = weights(workers, trained, 2 * VOCAB_SIZE)
    for name, tensor in weights(workers, tmp_path, 2 * VOCAB_SIZE).items():
        # With this learning rate a weight changes by at most 1e-12; bf16 rounds to 8 bits once.
        rounded = expected[name].to(tensor.dtype)
        torch.testing.assert_close(tensor, rounded, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_own_checkpoint_takes_precedence_over_weights_of_another_run(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, trained: Path
) -> None:
    copied(trained, tmp_path, newest=4)
    (tmp_path / "metrics.jsonl").unlink()
    values = language_model_values(tiny, tmp_path, load=str(tmp_path / "missing"))
    run(workers, 1, values, tmp_path)
    assert [step for _, step in records(tmp_path)] == [5]


def test_missing_weights(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, resume_only, language_model_values(tiny, tmp_path, load=str(tmp_path / "gone")), str(tmp_path))
    assert_facts(user_error_message(caught), tmp_path / "gone", "no complete checkpoint", "does not exist")
