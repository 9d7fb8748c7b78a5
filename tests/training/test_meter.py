"""Sums over steps, data-parallel ranks and pipeline stages; tensor-parallel ranks count once, unless a value is split
over them."""

from typing import Any

import pytest
import torch
from support.workers import WorkerPool


def drained(layout: dict[str, int]) -> list[dict[str, list[float]]]:
    """Runs in workers: two drains; each rank adds a value that identifies its data-parallel rank and stage."""
    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.runtime.distributed import start
    from megatron_prealign.training.meter import Meter

    runtime = start(ParallelSection(device="cpu", **layout), seed=1)
    meter = Meter({"loss": 1, "layers": 3, "counts": 2}, runtime)
    unit = 1 + 10 * runtime.data_rank + 100 * runtime.pipeline_rank
    for _ in range(2):
        meter.add("loss", torch.tensor(0.5 * unit, requires_grad=True))
    meter.add("layers", torch.tensor(float(unit)), index=2)
    meter.add("counts", torch.tensor([unit, 2**40]))
    meter.add("layers", torch.tensor(3.0 + runtime.tensor_rank), index=1, split_over_tensor_ranks=True)
    first = meter.drain()
    meter.add("layers", torch.tensor(1.0), index=0)
    return [first, meter.drain()]


@pytest.mark.parametrize(
    ("ranks", "layout", "total"),
    [
        (1, {}, 1),
        (2, {}, 1 + 11),
        (2, {"tensor_model_parallel_size": 2}, 1),
        (2, {"pipeline_model_parallel_size": 2}, 1 + 101),
        (4, {"pipeline_model_parallel_size": 2}, 1 + 11 + 101 + 111),
        (4, {"tensor_model_parallel_size": 2}, 1 + 11),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1 + 101),
    ],
    ids=["one", "dp2", "tp2", "pp2", "dp2_pp2", "tp2_dp2", "tp2_pp2"],
)
def test_sums_over_ranks(workers: WorkerPool, ranks: int, layout: dict[str, Any], total: int) -> None:
    tensor_ranks = layout.get("tensor_model_parallel_size", 1)
    adders = ranks // tensor_ranks
    split = 3.0 if tensor_ranks == 1 else 3.0 + 4.0
    for first, second in workers.run(ranks, drained, layout):
        assert first == {
            "loss": [float(total)],
            "layers": [0.0, adders * split, float(total)],
            # Integers are exact far above the range of fp32.
            "counts": [float(total), float(adders * 2**40)],
        }
        assert second == {"loss": [0.0], "layers": [float(adders), 0.0, 0.0], "counts": [0.0, 0.0]}
