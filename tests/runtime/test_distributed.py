"""Devices, process groups and the start of a run."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import assert_facts, user_error
from support.workers import WorkerError, WorkerPool

from megatron_prealign.errors import UserError
from megatron_prealign.recipe import ParallelSection
from megatron_prealign.runtime.distributed import choose_device


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, local_rank: int = 0) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))


@pytest.mark.parametrize(
    ("wanted", "gpus", "local_rank", "device"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 2, 1, "cuda:1"),
        ("cpu", 2, 0, "cpu"),
        ("cpu", 2, 5, "cpu"),
        ("cuda", 2, 0, "cuda:0"),
    ],
)
def test_each_process_has_its_own_device(
    monkeypatch: pytest.MonkeyPatch, wanted: str, gpus: int, local_rank: int, device: str
) -> None:
    pretend_gpus(monkeypatch, gpus, local_rank)
    assert str(choose_device(wanted)) == device


def test_no_gpu_although_one_is_requested(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 0)
    with user_error("parallel.device is cuda", "no GPU", "auto or cpu"):
        choose_device("cuda")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    pretend_gpus(monkeypatch, 2, local_rank=2)
    with user_error("2 GPUs", "rank 2", "--nproc-per-node to at most 2"):
        choose_device(wanted)


def where(**layout: Any) -> dict[str, Any]:
    from megatron_prealign.runtime.distributed import start

    runtime = start(ParallelSection(device="cpu", **layout), seed=1)
    return {
        "rank": runtime.rank,
        "world_size": runtime.world_size,
        "place": (runtime.pipeline_rank, runtime.data_rank, runtime.tensor_rank),
        "data_size": runtime.data_size,
        "ends": (runtime.is_first_stage, runtime.is_last_stage),
        "draw": torch.rand(2).tolist(),
    }


def start_with(tensor: int, pipeline: int) -> dict[str, Any]:
    return where(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)


def is_agreed(tensor: int, pipeline: int) -> bool:
    """Whether the error of a layout that does not fit is marked as that of all ranks."""
    with pytest.raises(UserError) as caught:
        start_with(tensor, pipeline)
    return caught.value.agreed


def patience_of(checkpoint_minutes: float) -> tuple[float, str]:
    """Timeout of the control group in minutes, and its backend."""
    import torch.distributed as dist

    from megatron_prealign.runtime import agreement
    from megatron_prealign.runtime.distributed import start

    start(ParallelSection(device="cpu"), seed=1, control_timeout_minutes=checkpoint_minutes)
    assert agreement._control is not None
    return agreement._control[2].total_seconds() / 60, dist.get_backend(agreement.control_group())


def timeout_of_the_engine(minutes: float) -> float:
    """Timeout of Megatron-Core's data-parallel group, in seconds."""
    from megatron_prealign.runtime.distributed import start

    runtime = start(ParallelSection(device="cpu", distributed_timeout_minutes=minutes), seed=1)
    options = runtime.groups.dp._get_backend(torch.device("cpu")).options
    return float(options._timeout.total_seconds())


def alone() -> dict[str, Any]:
    """Runs as without torchrun: no RANK, no process group."""
    import os

    import torch.distributed as dist

    from megatron_prealign.runtime.distributed import start, stop

    dist.destroy_process_group()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    start(ParallelSection(device="cpu"), seed=1)
    stop()
    gone = not dist.is_initialized()
    result = where()
    total = torch.ones(1)
    dist.all_reduce(total)
    stop(leave_process_group=True)
    return {**result, "gone": gone, "left": dist.is_initialized(), "total": total.item()}


def returns_before_all_have_connected(directory: str) -> bool:
    """Whether rank 0 is through with its start while rank 1 is still connecting."""
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_prealign.runtime import distributed

    rank, returned = dist.get_rank(), Path(directory) / "returned"
    dist.destroy_process_group()
    connect, early = dist.init_process_group, False

    def connect_slowly(backend: str, timeout: timedelta) -> None:
        nonlocal early
        connect(backend, timeout=timeout, init_method=f"file://{directory}/store", rank=rank, world_size=2)
        if rank == 1:
            time.sleep(0.3)
            early = returned.exists()

    dist.init_process_group = connect_slowly
    try:
        distributed._init_process_group(torch.device("cpu"), timedelta(seconds=20))
    finally:
        dist.init_process_group = connect
    if rank == 0:
        returned.touch()
    return early


def test_no_rank_can_end_while_another_is_still_connecting(workers: WorkerPool, tmp_path: Path) -> None:
    assert workers.run(2, returns_before_all_have_connected, str(tmp_path)) == [False, False]


def test_the_timeout_may_be_a_fraction_of_a_minute(workers: WorkerPool) -> None:
    assert workers.run(2, timeout_of_the_engine, 0.25) == [15.0, 15.0]


def test_ranks_have_their_coordinates(workers: WorkerPool) -> None:
    places = [each["place"] for each in workers.run(4, start_with, 2, 2)]
    # Tensor-parallel ranks are neighbours, pipeline stages are furthest apart.
    assert places == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]
    results = workers.run(4, start_with, 2, 1)
    assert [each["place"] for each in results] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert {each["data_size"] for each in results} == {2}
    assert {each["ends"] for each in results} == {(True, True)}
    assert [each["ends"] for each in workers.run(2, start_with, 1, 2)] == [(True, False), (False, True)]


def test_layout_that_does_not_fit_the_number_of_processes(workers: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, start_with, 3, 1, timeout_s=30)
    for kind, message, _ in caught.value.failures.values():
        assert kind == "UserError"
        assert_facts(message, "number of processes is 2", "multiple of", "parallel.tensor_model_parallel_size", "(3)")
    # Rank 0 prints it for all.
    assert workers.run(2, is_agreed, 3, 1, timeout_s=30) == [True, True]


def test_one_process_needs_no_launcher(workers: WorkerPool) -> None:
    result = workers.run(1, alone)[0]
    assert (result["rank"], result["world_size"], result["total"]) == (0, 1, 1.0)
    assert result["gone"]
    assert result["left"]


def test_ranks_wait_longer_than_one_may_work_alone(workers: WorkerPool) -> None:
    # At least two hours for the sample index, and always more than a save may take.
    assert workers.run(2, patience_of, 30.0) == [(121.0, "gloo")] * 2
    assert workers.run(2, patience_of, 300.0) == [(301.0, "gloo")] * 2
