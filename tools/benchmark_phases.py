"""`megatron-prealign benchmark phases`: speed of the alignment phase compared with language-model training.

Run it under torchrun to measure the parallel layout of a recipe, or in a single process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prealign.cli.recipe_options import parse_recipe
from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import check_output_file
from megatron_prealign.recipe.describe import PathText


@dataclass(frozen=True, kw_only=True)
class PhasesOptions:
    """Measures the speed of the alignment phase of a recipe compared with its language-model training."""

    steps: int = 20
    """Number of steps to measure per phase."""
    warmup: int = 5
    """Number of steps to run per phase before measuring."""
    output: PathText | None = None
    """CSV file to write, one row per phase."""


def main(argv: Sequence[str]) -> int:
    """Runs steps of both phases of a recipe and prints their speed."""
    recipe, values = parse_recipe("benchmark phases", PhasesOptions, argv)
    if values.steps < 1 or values.warmup < 0:
        raise UserError(
            f"--steps is {values.steps} and --warmup is {values.warmup}, expected at least 1 and at least 0"
        )
    check_output_file(values.output)

    from megatron_prealign.runtime import log

    # Before Megatron-Core is imported, because it warns about optional packages that are not installed.
    log.configure()
    from dataclasses import asdict

    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.benchmark.phases import measure_phases
    from megatron_prealign.benchmark.report import write_csv
    from megatron_prealign.runtime.distributed import choose_device, running
    from megatron_prealign.text import align, plural

    machine = describe_machine(choose_device(recipe.parallel.device))
    with running(recipe.parallel, seed=recipe.training.seed) as runtime:
        speeds = measure_phases(recipe, runtime, steps=values.steps, warmup=values.warmup)
    if runtime.rank:
        return 0
    rows = [
        (
            each.phase,
            f"{each.ms_per_step:,.1f}",
            f"{each.tokens_per_step:,.0f}",
            f"{each.tokens_per_second:,.0f}",
            f"{each.share_of_language_model:.1%}",
        )
        for each in speeds
    ]
    print("\n".join(machine.lines()))
    print(f"processes {speeds[0].processes}, medians of {plural(values.steps, 'step')} per phase, alternating")
    print("\n".join(align([("phase", "ms/step", "tokens/step", "tokens/s", "vs. language model"), *rows])))
    if values.output is not None:
        write_csv(values.output, [asdict(each) | asdict(machine) for each in speeds])
        print(f"wrote {values.output}")
    return 0
