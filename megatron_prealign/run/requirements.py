"""Memory of a process and size of the checkpoints of a run, computed from its recipe. Imports no torch."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from megatron_prealign.checkpoint.commit import tokenizer_files
from megatron_prealign.recipe import CheckpointSection, Recipe

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes of the states of one process; activations, buffers of communication and libraries are not included."""

    weights: int
    gradients: int
    """In fp32, whatever the dtype of the weights."""
    optimizer: int
    """fp32 moments and, in bf16, fp32 master weights."""
    checkpoint_copy: int
    """Host memory for the state that a background save writes; 0 without checkpoint.async_save."""

    @property
    def total(self) -> int:
        """Without the copy, which on a GPU is in another memory."""
        return self.weights + self.gradients + self.optimizer


def process_memory(recipe: Recipe, parameters: int, data_parallel_size: int) -> Memory:
    """Memory of a process.

    Args:
        parameters: Number of parameters of the process.
        data_parallel_size: Number of processes that a distributed optimizer is sharded over.
    """
    weight = _weight_bytes(recipe)
    # In fp32 the optimizer updates the weights themselves.
    state = (2 if weight == _FP32 else 3) * _FP32
    shards = data_parallel_size if recipe.parallel.use_distributed_optimizer else 1
    return Memory(
        weights=parameters * weight,
        gradients=parameters * _FP32,
        optimizer=parameters * state // shards,
        checkpoint_copy=parameters * (weight + _saved_state_bytes(recipe) // shards)
        if recipe.checkpoint.async_save
        else 0,
    )


def checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Size of a checkpoint: weights, optimizer states, projection heads and tokenizer, without the few kB of metadata.

    Args:
        parameters: Number of parameters of the complete model.
    """
    tokenizer = sum(path.stat().st_size for path in tokenizer_files(Path(recipe.data.tokenizer)))
    model = parameters * (_weight_bytes(recipe) + _saved_state_bytes(recipe))
    return model + _head_parameters(recipe) * 3 * _FP32 + tokenizer


def _weight_bytes(recipe: Recipe) -> int:
    return 2 if recipe.training.precision == "bf16" else _FP32


def _saved_state_bytes(recipe: Recipe) -> int:
    """Bytes of saved optimizer state per parameter. The distributed optimizer saves master weights in fp32 too."""
    has_master_weights = recipe.parallel.use_distributed_optimizer or recipe.training.precision == "bf16"
    return (3 if has_master_weights else 2) * _FP32


def _head_parameters(recipe: Recipe) -> int:
    """Parameters of all projection heads."""
    section, hidden = recipe.alignment, recipe.model.hidden_size
    if section is None or section.projection_size is None:
        return 0
    heads = sum(weight > 0 for weight in section.layer_weights(recipe.model.num_layers))
    return heads * (hidden * hidden + hidden + section.projection_size * (hidden + 1))


def saved_steps(steps_of_phases: Sequence[int], interval: int | None) -> list[int]:
    """Steps of the run after which a checkpoint is saved: every `interval` steps and at the end of each phase."""
    ends = list(accumulate(steps_of_phases))
    regular = range(interval, ends[-1] + 1, interval) if interval is not None else ()
    return sorted({*ends, *regular})


def most_checkpoints(steps: Sequence[int], section: CheckpointSection) -> int:
    """Largest number of checkpoints on the disk at once: those that are kept, and one that is being written.

    Args:
        steps: Result of `saved_steps`.
    """
    protected = {step for step in steps if section.keep_every is not None and step % section.keep_every == 0}
    kept = len(protected.union(steps[-section.keep :])) + (section.keep_best is not None)
    return min(len(steps), kept + 1)


def free_disk_bytes(directory: Path) -> int | None:
    """Free bytes on the disk of a directory that need not exist yet; None if unknown."""
    existing = next((path for path in [directory, *directory.absolute().parents] if path.exists()), None)
    try:
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None
