"""`megatron-prealign benchmark phases`: the speed of the alignment phase against language-model training.

Under torchrun it measures the layout of the recipe, alone one process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prealign.benchmark.options import check_output
from megatron_prealign.cli.recipe_options import parse_recipe
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import PathText


@dataclass(frozen=True, kw_only=True)
class PhasesOptions:
    """Measures the speed of the alignment phase of a recipe against its language-model training."""

    steps: int = 20
    """Number of steps of each phase to measure."""
    warmup: int = 5
    """Number of steps of each phase to run before that."""
    output: PathText | None = None
    """Write a CSV file, one row per phase."""


def main(argv: Sequence[str]) -> int:
    """Runs some steps of both phases of a recipe and prints the speed of each."""
    recipe, values = parse_recipe("benchmark phases", PhasesOptions, argv)
    if values.steps < 1 or values.warmup < 0:
        raise UserError(f"--steps is {values.steps} and --warmup {values.warmup}, expected at least 1 and at least 0")
    check_output(values.output)

    from megatron_prealign.runtime import log

    # Before Megatron-Core is imported, which warns of what is not installed.
    log.configure()
    from dataclasses import asdict

    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.benchmark.phases import measure_phases
    from megatron_prealign.benchmark.report import align, write_csv
    from megatron_prealign.runtime.distributed import choose_device, running

    machine = describe_machine(choose_device(recipe.parallel.device))
    with running(recipe.parallel, seed=recipe.training.seed) as runtime:
        found = measure_phases(recipe, runtime, steps=values.steps, warmup=values.warmup)
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
        for each in found
    ]
    print("\n".join(machine.lines()))
    print(f"processes {found[0].processes}, medians of {values.steps} steps of each phase, alternating")
    print("\n".join(align([("phase", "ms/step", "tokens/step", "tokens/s", "of language model"), *rows])))
    if values.output is not None:
        write_csv(values.output, [asdict(each) | asdict(machine) for each in found])
        print(f"wrote {values.output}")
    return 0
