"""CUDA calls redirected to the CPU, as Megatron-Core makes them."""

from typing import Any

import pytest
from support.workers import WorkerPool


def names() -> dict[str, Any]:
    import torch

    from megatron_prealign.runtime import cpu

    cpu.enable()
    cpu.enable()
    one = torch.ones(2)
    return {
        "kinds": {
            "constructor": torch.zeros(1, device="cuda").device.type,
            "numbered": torch.empty(1, device="cuda:3").device.type,
            "integer": torch.full((1,), 2.0, device=0).device.type,
            "device": torch.arange(3, device=torch.device("cuda", 1)).device.type,
            "tensor": torch.tensor([1], device=torch.cuda.current_device()).device.type,
            "like": torch.zeros_like(one, device="cuda").device.type,
            "new": one.new_ones((1,), device="cuda").device.type,
            "to": one.to("cuda").device.type,
            "to_device": one.to(torch.device("cuda", 0)).device.type,
            "to_both": one.to("cuda", torch.float64).device.type,
            "to_keyword": one.to(device="cuda:1").device.type,
        },
        "cuda_is_itself": one.cuda() is one and one.cuda(0, non_blocking=True) is one,
        "dtype_of_to": str(one.to("cuda", torch.float64).dtype),
        "types": [
            tensor.type()
            for tensor in (one, one.half(), one.bfloat16(), one.double(), torch.ones(1, dtype=torch.int64))
        ],
        "type_converts": str(one.type(torch.float64).dtype),
        "synchronize": torch.cuda.synchronize(),
        "capturing": torch.cuda.is_current_stream_capturing(),
    }


def random_states() -> dict[str, Any]:
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.runtime.distributed import start

    runtime = start(ParallelSection(device="cpu", tensor_model_parallel_size=2), seed=5)
    assert runtime.world_size == 2
    torch.cuda.manual_seed(11)
    first = torch.rand(3)
    torch.manual_seed(11)
    same_seed = torch.equal(first, torch.rand(3))
    state = torch.cuda.get_rng_state()
    draw = torch.rand(3)
    torch.cuda.set_rng_state(state)
    same_state = torch.equal(draw, torch.rand(3))
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    outside = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(3)
    return {
        "same_seed": same_seed,
        "same_state": same_state,
        "fork_leaves_no_trace": torch.equal(outside, torch.get_rng_state()),
        "inside": inside.tolist(),
        "outside": torch.rand(3).tolist(),
    }


@pytest.fixture(scope="module")
def results(workers: WorkerPool) -> dict[str, Any]:
    return workers.run(1, names)[0]


def test_cuda_devices_are_the_cpu(results: dict[str, Any]) -> None:
    assert results["kinds"] == dict.fromkeys(results["kinds"], "cpu")
    assert results["cuda_is_itself"]
    assert results["dtype_of_to"] == "torch.float64"


def test_type_names_are_those_the_optimizers_compare(results: dict[str, Any]) -> None:
    kinds = ("Float", "Half", "BFloat16", "Double", "Long")
    assert results["types"] == [f"torch.cuda.{kind}Tensor" for kind in kinds]
    assert results["type_converts"] == "torch.float64"


def test_synchronisation_does_nothing(results: dict[str, Any]) -> None:
    assert results["synchronize"] is None
    assert results["capturing"] is False


def test_random_states_are_the_cpu_generators(workers: WorkerPool) -> None:
    first, second = workers.run(2, random_states)
    for result in (first, second):
        assert result["same_seed"]
        assert result["same_state"]
        assert result["fork_leaves_no_trace"]
    # Tensor-parallel ranks draw different values inside the fork and the same outside.
    assert first["inside"] != second["inside"]
    assert first["outside"] == second["outside"]
