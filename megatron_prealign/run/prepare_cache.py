"""Makes the sample index that a training run would make, before it and without its processes."""

from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.checkpoint.resume.start import preview_start
from megatron_prealign.data.index_cache import load_arrays
from megatron_prealign.recipe import Recipe
from megatron_prealign.run.inputs import open_plan, open_vocabulary


@dataclass(frozen=True)
class PrepareCacheResult:
    """A sample index that training will find."""

    directory: Path
    built: bool
    """False if it was there already."""
    samples: int
    """Rows of the whole run."""
    bytes: int
    """Size of its arrays."""


def prepare_cache(recipe: Recipe) -> PrepareCacheResult:
    """Writes the sample index of a recipe into its cache directory, unless it is there. No process group, no GPU.

    Training with the same data, weights, sequence length, budget and seed finds it, from any directory and in any
    layout; a run that goes on with another blend finds what it needs from its checkpoint on. Several processes may call
    it: those on one disk take turns, and the first one does the work.

    Raises:
        UserError: the tokenizer, a dataset or the checkpoint to go on from is missing, damaged or does not fit, or the
            directory cannot be written.
    """
    plan = open_plan(recipe, open_vocabulary(recipe), preview_start(recipe))
    built = plan.write_index()
    size = sum(array.nbytes for array in load_arrays(plan.directory).values())
    return PrepareCacheResult(plan.directory, built, plan.num_samples, size)
