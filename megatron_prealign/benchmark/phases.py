"""Benchmark of the two phases of a recipe: the alignment phase compared with language-model training.

Steps of both phases alternate, so that other load on the machine affects both.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError
from megatron_prealign.model.build import build_model
from megatron_prealign.recipe import Recipe
from megatron_prealign.run.inputs import RunInputs, open_inputs
from megatron_prealign.run.pretrain import build_phases, build_word_steps, check_world_size
from megatron_prealign.runtime.agreement import from_rank_zero, on_every_rank
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import wrap_data_parallel
from megatron_prealign.runtime.optimizer import build_optimizer
from megatron_prealign.training.phase import Phase
from megatron_prealign.training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class PhaseSpeed:
    """Speed of one phase, medians over its steps."""

    phase: str
    processes: int
    steps: int
    ms_per_step: float
    tokens_per_step: float
    tokens_per_second: float
    share_of_language_model: float
    """Tokens per second relative to language-model training."""


def measure_phases(recipe: Recipe, runtime: Runtime, *, steps: int, warmup: int) -> list[PhaseSpeed]:
    """Runs `warmup + steps` steps of each phase, without saving or evaluating. Collective: call on all ranks.

    Returns:
        The speed of each phase; language-model training is last.

    Raises:
        UserError: the recipe has no alignment section, or does not match its files.
    """
    if recipe.alignment is None:
        raise UserError("alignment is null, expected a section alignment to compare with language-model training")
    with shared_directory() as directory:
        trainer, _ = build_trainer(_shorten(recipe, directory, steps + warmup), runtime)
        schedules = [trainer.build_schedule(phase) for phase in trainer.phases]
        states = [TrainState() for _ in trainer.phases]
        seconds: list[list[float]] = [[] for _ in trainer.phases]
        tokens: list[list[int]] = [[] for _ in trainer.phases]
        for _ in range(warmup + steps):
            for number, phase in enumerate(trainer.phases):
                # Each phase continues where it was, so that it finds what it has read ahead.
                trainer.state = states[number]
                before = trainer.state.tokens
                start_s = synchronised_time_s(runtime)
                trainer.step(phase, schedules[number])
                seconds[number].append(synchronised_time_s(runtime) - start_s)
                tokens[number].append(trainer.state.tokens - before)
        for phase in trainer.phases:
            phase.end()
    speeds = [
        _speed(phase, runtime, times[warmup:], counts[warmup:])
        for phase, times, counts in zip(trainer.phases, seconds, tokens, strict=True)
    ]
    last = speeds[-1].tokens_per_second
    return [replace(each, share_of_language_model=each.tokens_per_second / last) for each in speeds]


def _speed(phase: Phase, runtime: Runtime, seconds: list[float], tokens: list[int]) -> PhaseSpeed:
    rates = [count / time_s for count, time_s in zip(tokens, seconds, strict=True)]
    return PhaseSpeed(
        phase=phase.name,
        processes=runtime.world_size,
        steps=len(seconds),
        ms_per_step=1e3 * statistics.median(seconds),
        tokens_per_step=statistics.median(tokens),
        tokens_per_second=statistics.median(rates),
        share_of_language_model=1.0,
    )


@contextmanager
def shared_directory() -> Iterator[Path]:
    """Temporary directory for the sample index, the same on all ranks of a machine."""
    created: list[tempfile.TemporaryDirectory[str]] = []

    def create() -> str:
        created.append(tempfile.TemporaryDirectory(prefix="megatron_prealign_"))
        return created[0].name

    try:
        yield Path(from_rank_zero("creating a directory", create))
    finally:
        for directory in created:
            directory.cleanup()


def _shorten(recipe: Recipe, directory: Path, steps: int) -> Recipe:
    """Reduces the recipe to `steps` steps of each phase, without guard and watch."""
    assert recipe.alignment is not None
    return replace(
        recipe,
        alignment=replace(recipe.alignment, train_iters=steps, lr_warmup_iters=0),
        optimizer=replace(recipe.optimizer, lr_warmup_iters=0),
        training=replace(recipe.training, train_iters=steps, train_tokens=None),
        logging=replace(recipe.logging, run_dir=str(directory), tensorboard=False),
        alignment_guard=None,
        alignment_watch=None,
    )


def build_trainer(recipe: Recipe, runtime: Runtime) -> tuple[Trainer, RunInputs]:
    """Trainer of a recipe without callbacks, and its inputs. Collective: call on all ranks."""
    on_every_rank("checking the recipe", lambda: check_world_size(recipe, runtime))
    inputs = open_inputs(recipe)
    words = on_every_rank("preparing the words", lambda: build_word_steps(recipe, runtime, inputs.dictionary))
    phases = on_every_rank("building the phases", lambda: build_phases(recipe, runtime, inputs, words))
    models = build_model(recipe, runtime, vocab_size=inputs.vocabulary.size)
    chunks = wrap_data_parallel(models, recipe.parallel)
    if words is not None:
        words.attach(chunks)
    return Trainer(recipe, runtime, chunks, build_optimizer(recipe, chunks), phases, [], TrainState()), inputs


def synchronised_time_s(runtime: Runtime) -> float:
    """Host time in seconds after synchronising with the device."""
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    return time.perf_counter()
