"""Builds the sample index of a training run ahead of it, without starting its processes."""

from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.checkpoint.resume.start import preview_start
from megatron_prealign.data.index_cache import load_arrays
from megatron_prealign.recipe import Recipe
from megatron_prealign.run.inputs import open_plan, open_vocabulary


@dataclass(frozen=True)
class PrepareCacheResult:
    """Sample index in the cache directory."""

    directory: Path
    built: bool
    """False if the index already existed."""
    samples: int
    """Number of samples of the complete run."""
    bytes: int
    """Size of the arrays in bytes."""


def prepare_cache(recipe: Recipe) -> PrepareCacheResult:
    """Writes the sample index of a recipe into its cache directory unless it exists. Needs no process group and no GPU.

    Training with the same data, weights, sequence length, budget and seed finds it, from any directory and in any
    layout; for a run that resumes with another blend, the index starts at its checkpoint. Several processes may call
    this: on a shared disk they take turns, and the first one builds the index.

    Raises:
        UserError: The tokenizer, a dataset or the checkpoint to resume from is missing, corrupt or incompatible with
            the recipe, or the directory is not writable.
    """
    plan = open_plan(recipe, open_vocabulary(recipe), preview_start(recipe))
    built = plan.write_index()
    size = sum(array.nbytes for array in load_arrays(plan.directory).values())
    return PrepareCacheResult(plan.directory, built, plan.num_samples, size)
