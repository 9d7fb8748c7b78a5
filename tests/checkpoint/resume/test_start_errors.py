"""A run that cannot start: every rank raises the error at once, and the processes stay usable."""

import os
from pathlib import Path
from typing import Any

import pytest
from support.tiny import Tiny, recipe_of
from support.whole_runs import train
from support.workers import WorkerError, WorkerPool

# A rank that waited for a failed one would block for parallel.distributed_timeout_minutes, 10; the tests take a second,
# the rest is for a busy machine.
PROMPT_S = 60.0


def train_with_other_values(values: list[dict[str, Any]], directory: str) -> Any:
    """Each rank has its own recipe, as if a file were missing on its local disk."""
    rank = int(os.environ["RANK"])
    return train(values[rank], f"{directory}/{rank}")


def fail_and_check_groups(values: dict[str, Any], directory: str, leave: bool) -> dict[str, bool]:
    """Which process groups exist after a run fails."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_prealign.errors import UserError
    from megatron_prealign.run.pretrain import pretrain

    with pytest.raises(UserError):
        pretrain(recipe_of(values, Path(directory)), leave_process_group=leave)
    return {"group": dist.is_initialized(), "megatron": parallel_state.model_parallel_is_initialized()}


def failures(caught: pytest.ExceptionInfo[WorkerError]) -> dict[int, tuple[str, str]]:
    return {rank: (kind, message) for rank, (kind, message, _) in caught.value.failures.items()}


@pytest.mark.parametrize("what", ["tokenizer", "table", "source", "cache"])
def test_file_missing_on_one_rank(tiny: Tiny, workers: WorkerPool, tmp_path: Path, what: str) -> None:
    values = [tiny.values(tmp_path / "run") for _ in range(2)]
    gone = str(tmp_path / "gone")
    broken = 1
    if what == "tokenizer":
        values[broken]["data"]["tokenizer"] = gone
    elif what == "table":
        values[broken]["dictionary"]["table"] = gone
    elif what == "source":
        values[broken]["data"]["sources"][1]["path"] = gone
    else:
        # Rank 0 is the one that builds.
        broken = 0
        Path(gone).write_text("a file in the way of the cache")
        values[broken]["data"]["cache"] = f"{gone}/cache"
    with pytest.raises(WorkerError) as caught:
        workers.run(2, train_with_other_values, values, str(tmp_path), timeout_s=PROMPT_S)
    errors = failures(caught)
    assert errors[0] == errors[1]
    assert errors[0][0] == "UserError"
    assert gone in errors[0][1]


@pytest.mark.parametrize("leave", [True, False])
def test_failed_run_leaves_the_process_group(tiny: Tiny, workers: WorkerPool, tmp_path: Path, leave: bool) -> None:
    # Another rank may be in a collective: with NCCL, destroying the group would wait for that rank.
    values = tiny.values(tmp_path / "run")
    values["data"]["tokenizer"] = str(tmp_path / "gone")
    left = workers.run(1, fail_and_check_groups, values, str(tmp_path), leave)
    assert left == [{"group": True, "megatron": False}]


def test_tensorboard_directory_that_is_a_file(tiny: Tiny, workers: WorkerPool, tmp_path: Path) -> None:
    values = tiny.values(tmp_path / "run")
    values["logging"]["tensorboard"] = True
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    with pytest.raises(WorkerError) as caught:
        workers.run(2, train, values, str(tmp_path), timeout_s=PROMPT_S)
    errors = failures(caught)
    assert errors[0] == errors[1]
    assert errors[0][0] == "UserError"
    assert str(tmp_path / "run" / "tensorboard") in errors[0][1]


def test_a_refused_run_leaves_nothing_behind(tiny: Tiny, workers: WorkerPool, tmp_path: Path) -> None:
    values = tiny.values(tmp_path / "runs" / "new")
    values["logging"]["tensorboard"] = True
    values["dictionary"]["table"] = str(tmp_path / "gone")
    with pytest.raises(WorkerError) as caught:
        workers.run(1, train, values, str(tmp_path / "recipe"))
    assert failures(caught)[0][0] == "UserError"
    assert not (tmp_path / "runs").exists()


def check_directories(values: dict[str, Any], directory: str, other: str | None) -> None:
    """Runs in a worker: checks the run's directories while another run creates its own next to them."""
    from megatron_prealign.files import directories
    from megatron_prealign.run.output_paths import check_directories_writable

    probe = directories.TemporaryFile

    def probe_and_make(**options: Any) -> Any:
        if other is not None:
            Path(other).mkdir(exist_ok=True)
        return probe(**options)

    directories.TemporaryFile = probe_and_make
    try:
        check_directories_writable(recipe_of(values, Path(directory)))
    finally:
        directories.TemporaryFile = probe


def test_checking_the_directories_keeps_those_of_another_run(tiny: Tiny, workers: WorkerPool, tmp_path: Path) -> None:
    values = tiny.values(tmp_path / "runs" / "new")
    other = tmp_path / "runs" / "other"
    workers.run(1, check_directories, values, str(tmp_path / "recipe"), str(other))
    assert [each.name for each in (tmp_path / "runs").iterdir()] == ["other"]


def test_directories_that_cannot_be_written_leave_nothing_behind(
    tiny: Tiny, workers: WorkerPool, tmp_path: Path
) -> None:
    values = tiny.values(tmp_path / "runs" / "new")
    (tmp_path / "file").write_text("a file in the way")
    values["checkpoint"] = {"directory": str(tmp_path / "file" / "checkpoints")}
    with pytest.raises(WorkerError) as caught:
        workers.run(1, check_directories, values, str(tmp_path / "recipe"), None)
    assert failures(caught)[0][0] == "UserError"
    assert not (tmp_path / "runs").exists()
