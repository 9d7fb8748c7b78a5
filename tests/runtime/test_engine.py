"""Length of the schedule, idle microbatches, and the learning rate."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from support.workers import WorkerPool

from megatron_prealign.recipe import ParallelSection

PLAIN = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}


def lengths(layout: dict[str, int]) -> list[int]:
    from megatron_prealign.runtime.engine import schedule_length

    runtime: Any = SimpleNamespace(parallel=ParallelSection(**layout))
    return [schedule_length(runtime, microbatches) for microbatches in range(1, 6)]


def arguments_of_schedule(layout: dict[str, int], mixed_shapes: bool) -> dict[str, Any]:
    """Runs `run_schedule` with a fake of Megatron-Core's schedule; returns the arguments that it receives."""
    from megatron_prealign.runtime import engine

    received: dict[str, Any] = {}

    def schedule(**arguments: Any) -> None:
        iterators = arguments["data_iterator"]
        iterators = iterators if isinstance(iterators, list) else [iterators]
        received.update(arguments, data_iterator=[list(each) for each in iterators], model=len(arguments["model"]))
        del received["forward_step_func"]

    parallel = ParallelSection(**layout)
    config = SimpleNamespace(variable_seq_lengths=None)
    chunks: Any = [SimpleNamespace(config=config) for _ in range(parallel.model_chunks)]
    real, engine.get_forward_backward_func = engine.get_forward_backward_func, lambda: schedule
    try:
        engine.run_schedule(
            SimpleNamespace(parallel=parallel),
            chunks,
            lambda iterator, chunk: None,
            ["words", "samples 1", "samples 2"],
            idle=lambda: "idle",
            shape=(16, 2),
            mixed_shapes=mixed_shapes,
        )
    finally:
        engine.get_forward_backward_func = real
    return {**received, "variable": config.variable_seq_lengths}


def rates(style: str, warmup: int, decay: int, first: int) -> list[float]:
    """Learning rates of the steps from `first` on, updated as by the trainer."""
    from megatron_prealign.runtime.optimizer import build_schedule

    optimizer: Any = SimpleNamespace(param_groups=[{"lr": 0.0, "wd_mult": 1.0, "lr_mult": 1.0}])
    schedule = build_schedule(
        optimizer, lr=1.0, min_lr=0.1, decay_style=style, warmup_iters=warmup, decay_iters=decay, weight_decay=0.25
    )
    schedule.step(first)
    result = []
    for _ in range(decay - first):
        schedule.step(1)
        assert optimizer.param_groups[0]["weight_decay"] == 0.25
        result.append(float(optimizer.param_groups[0]["lr"]))
    return result


def test_interleaved_schedule_is_padded_to_a_multiple_of_the_pipeline_size(workers: WorkerPool) -> None:
    assert workers.run(1, lengths, INTERLEAVED)[0] == [2, 2, 4, 4, 6]
    assert workers.run(1, lengths, PLAIN)[0] == [1, 2, 3, 4, 5]


def test_idle_microbatches_come_first(workers: WorkerPool) -> None:
    received = workers.run(1, arguments_of_schedule, INTERLEAVED, True)[0]
    # The last microbatch starts the gradient reduction, so it must touch every parameter.
    assert received["data_iterator"] == [["idle", "words", "samples 1", "samples 2"]] * 2
    assert received["num_microbatches"] == 4
    assert (received["seq_length"], received["micro_batch_size"]) == (16, 2)
    assert received["forward_only"] is False
    assert received["variable"] is True


def test_plain_schedule_has_no_idle_microbatch(workers: WorkerPool) -> None:
    received = workers.run(1, arguments_of_schedule, PLAIN, False)[0]
    assert received["data_iterator"] == [["words", "samples 1", "samples 2"]]
    assert received["num_microbatches"] == 3
    assert received["variable"] is False
    # A single stage sends nothing, so no shapes need to be sent.
    assert workers.run(1, arguments_of_schedule, {}, True)[0]["variable"] is False


@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
def test_learning_rate_warms_up_and_decays(workers: WorkerPool, style: str, first: int) -> None:
    warmup, decay = 4, 14

    def expected(step: int) -> float:
        if step <= warmup:
            return step / warmup
        done = (step - warmup) / (decay - warmup)
        return {
            "constant": 1.0,
            "linear": 1.0 - 0.9 * done,
            "cosine": 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)),
        }[style]

    result = workers.run(1, rates, style, warmup, decay, first)[0]
    # Both compute in double precision; only the order of the operations differs. The first step has a rate above 0.
    assert result == pytest.approx([expected(step) for step in range(first + 1, decay + 1)], rel=1e-9)
