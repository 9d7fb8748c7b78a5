"""`megatron-prealign benchmark data-wait`: how long steps wait for samples, read on demand and ahead.

Run it under torchrun to measure the parallel layout of a recipe, or in a single process.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prealign.cli.recipe_options import parse_recipe
from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import check_output_file
from megatron_prealign.recipe.describe import PathText


@dataclass(frozen=True, kw_only=True)
class DataWaitOptions:
    """Measures how long steps of language-model training wait for samples of a slow disk, read on demand and ahead."""

    pause_ms: float = 2.0
    """Milliseconds by which reading a sample is slowed down."""
    steps: int = 20
    """Number of steps to measure in each way of reading."""
    warmup: int = 1
    """Number of steps to run before each block of five measured ones."""
    output: PathText | None = None
    """CSV file to write, one row per way of reading."""


def main(argv: Sequence[str]) -> int:
    """Runs steps of a recipe in both ways of reading and prints how long they wait for data."""
    recipe, values = parse_recipe("benchmark data-wait", DataWaitOptions, argv)
    if values.steps < 1 or values.warmup < 1:
        raise UserError(f"--steps is {values.steps} and --warmup is {values.warmup}, expected at least 1")
    if not 0 <= values.pause_ms <= 60_000:
        raise UserError(f"--pause-ms is {values.pause_ms:g}, expected 0 to 60000")
    check_output_file(values.output)

    from megatron_prealign.runtime import log

    # Before Megatron-Core is imported, because it warns about optional packages that are not installed.
    log.configure()
    from dataclasses import asdict

    from megatron_prealign.benchmark.data_wait import measure_data_wait
    from megatron_prealign.benchmark.machine import describe_machine
    from megatron_prealign.benchmark.report import write_csv
    from megatron_prealign.runtime.distributed import choose_device, running
    from megatron_prealign.text import align, plural

    machine = describe_machine(choose_device(recipe.parallel.device))
    with running(recipe.parallel, seed=recipe.training.seed) as runtime:
        waits = measure_data_wait(recipe, runtime, pause_ms=values.pause_ms, steps=values.steps, warmup=values.warmup)
    if runtime.rank:
        return 0
    print("\n".join(machine.lines()))
    print(
        f"processes {waits[0].processes}, {plural(waits[0].samples_per_process, 'sample')} a step and process, pause "
        f"of {values.pause_ms:g} ms a sample, medians of {plural(values.steps, 'step')}, in alternating blocks"
    )
    rows = [(each.reading, f"{each.wait_ms:,.2f}", f"{each.ms_per_step:,.1f}") for each in waits]
    print("\n".join(align([("reading", "wait ms/step", "ms/step"), *rows])))
    if values.output is not None:
        write_csv(values.output, [asdict(each) | asdict(machine) for each in waits])
        print(f"wrote {values.output}")
    return 0
