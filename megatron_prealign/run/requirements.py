"""Memory of a process and size of the checkpoints of a run, computed from its recipe. Imports no torch."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import lcm
from pathlib import Path

from megatron_prealign.checkpoint.commit import tokenizer_files
from megatron_prealign.recipe import CheckpointSection, Recipe

_FP32 = 4
_MOST_LISTED = 10_000


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


@dataclass(frozen=True)
class SavedSteps:
    """Steps of a run after which a checkpoint is saved: every `interval` steps and at the end of each phase. They are
    counted and not listed, since there may be any number of them."""

    ends: tuple[int, ...]
    """Last step of each phase."""
    interval: int | None

    @classmethod
    def of_phases(cls, steps: Sequence[int], interval: int | None) -> "SavedSteps":
        """Saved steps of phases with these numbers of steps."""
        return cls(tuple(accumulate(steps)), interval)

    def count(self, every: int = 1) -> int:
        """How many of them are multiples of `every`."""
        regular = 0 if self.interval is None else self.ends[-1] // lcm(self.interval, every)
        others = {end for end in self.ends if self.interval is None or end % self.interval}
        return regular + sum(end % every == 0 for end in others)

    def newest(self, count: int) -> list[int]:
        """The last `count` of them, in order."""
        regular = () if self.interval is None else range(self.interval, self.ends[-1] + 1, self.interval)[-count:]
        return sorted({*self.ends, *regular})[-count:]


def most_checkpoints(steps: SavedSteps, section: CheckpointSection) -> int:
    """Largest number of checkpoints on the disk at once: those that are kept, and one that is being written."""
    kept = min(section.keep, steps.count())
    if section.keep_every is not None:
        # Of the newest ones, those that keep_every keeps anyway; at most, if they are too many to list.
        newest = steps.newest(kept) if kept <= _MOST_LISTED else []
        kept += steps.count(section.keep_every) - sum(step % section.keep_every == 0 for step in newest)
    return min(steps.count(), kept + (section.keep_best is not None) + 1)


def free_disk_bytes(directory: Path) -> int | None:
    """Free bytes on the disk of a directory that need not exist yet; None if unknown."""
    existing = next((path for path in [directory, *directory.absolute().parents] if path.exists()), None)
    try:
        return None if existing is None else shutil.disk_usage(existing).free
    except OSError:
        return None
