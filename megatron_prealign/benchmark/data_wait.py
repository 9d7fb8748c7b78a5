"""Benchmark of reading ahead: how long a step of language-model training waits for its samples.

A slow disk is simulated by a pause for every sample. Blocks of steps that read on demand and that read ahead
alternate, so that other load on the machine affects both. Single steps must not alternate: the thread that reads ahead
would have the time of two steps.
"""

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prealign.benchmark.phases import build_trainer, shared_directory, synchronised_time_s
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.data.samples import SampleBatch, TrainSamples
from megatron_prealign.recipe import Recipe
from megatron_prealign.run.pretrain import build_phases
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.training.meter import max_over_ranks

BLOCK = 5
"""Measured steps of a block."""


@dataclass(frozen=True, kw_only=True)
class DataWait:
    """Waiting for data in one way of reading, medians over the steps."""

    reading: str
    """`on demand` or `ahead`."""
    processes: int
    steps: int
    samples_per_process: int
    """Samples that a process reads in a step."""
    pause_ms: float
    """Pause for every sample."""
    wait_ms: float
    """Time that a step waits for its samples, of the rank that waits longest."""
    ms_per_step: float


def measure_data_wait(recipe: Recipe, runtime: Runtime, *, pause_ms: float, steps: int, warmup: int) -> list[DataWait]:
    """Runs blocks of `warmup + BLOCK` steps in both ways of reading until `steps` are measured in each.

    Collective: call on all ranks.

    Args:
        warmup: Steps of a block that are not measured; at least 1.
    """
    blocks = -(-steps // BLOCK)
    waits_ms: list[list[float]] = [[], []]
    times_ms: list[list[float]] = [[], []]
    with shared_directory() as directory:
        trainer, inputs = build_trainer(_shorten(recipe, directory, blocks * (warmup + BLOCK)), runtime)
        slow = replace(inputs, train=_with_pause(inputs.train, pause_ms / 1e3))
        trainer.phases = [build_phases(trainer.recipe, runtime, slow, None)[0] for _ in range(2)]
        trainer.phases[0].following = lambda state: None  # type: ignore[method-assign]
        schedules = [trainer.build_schedule(phase) for phase in trainer.phases]
        states = [TrainState(), TrainState()]
        for number, step in [
            (number, step) for _ in range(blocks) for number in range(2) for step in range(warmup + BLOCK)
        ]:
            phase, trainer.state = trainer.phases[number], states[number]
            start_s = synchronised_time_s(runtime)
            trainer.step(phase, schedules[number])
            time_ms = 1e3 * (synchronised_time_s(runtime) - start_s)
            wait_ms = 1e3 * max_over_ranks(phase.drain_waited_s(), runtime)
            if step >= warmup and len(times_ms[number]) < steps:
                times_ms[number].append(time_ms)
                waits_ms[number].append(wait_ms)
        for phase in trainer.phases:
            phase.end()
    return [
        DataWait(
            reading=reading,
            processes=runtime.world_size,
            steps=steps,
            samples_per_process=recipe.training.global_batch_size // runtime.data_size,
            pause_ms=pause_ms,
            wait_ms=statistics.median(waits),
            ms_per_step=statistics.median(times),
        )
        for reading, waits, times in zip(("on demand", "ahead"), waits_ms, times_ms, strict=True)
    ]


def _with_pause(samples: TrainSamples, pause_s: float) -> TrainSamples:
    slow = copy.copy(samples)

    def batch(indices: Sequence[int]) -> SampleBatch:
        time.sleep(pause_s * len(indices))
        return samples.batch(indices)

    slow.batch = batch  # type: ignore[method-assign]
    return slow


def _shorten(recipe: Recipe, directory: Path, steps: int) -> Recipe:
    """Reduces the recipe to `steps` steps of language-model training."""
    return replace(
        recipe,
        alignment=None,
        alignment_guard=None,
        alignment_watch=None,
        optimizer=replace(recipe.optimizer, lr_warmup_iters=0),
        training=replace(recipe.training, train_iters=steps, train_tokens=None),
        logging=replace(recipe.logging, run_dir=str(directory), tensorboard=False),
    )
