"""`megatron-prealign evaluate`: evaluates trained runs and writes the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prealign.cli.options import errors_of_options, parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import PathText
from megatron_prealign.text import closing, command, plural


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluates the newest checkpoint of each run and writes report.json, report.html and report.png."""

    run: list[str]
    """Runs to evaluate, as NAME=DIRECTORY; all are compared with the first."""
    output: PathText
    """Output directory of the report."""
    tensor_model_parallel_size: int = 1
    """Number of ranks that each layer's weight matrices are partitioned over; may differ from training."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages that the layers are partitioned over; may differ from training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto uses CUDA if a GPU is available."""


def main(argv: Sequence[str]) -> int:
    """Runs `megatron-prealign evaluate` with the arguments `argv`."""
    options = parse_options(EvaluateOptions, "evaluate", argv)
    runs = dict(_named_run(text) for text in options.run)
    if len(runs) != len(options.run):
        raise UserError(f"--run is {', '.join(options.run)}, expected every name only once")

    from megatron_prealign.runtime import log

    log.configure()
    from megatron_prealign.evaluation.report import report_table
    from megatron_prealign.files.directories import check_writable
    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.run.evaluate import evaluate_runs

    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "device")
    with errors_of_options([f"parallel.{name}" for name in names]):
        parallel = ParallelSection(**{name: getattr(options, name) for name in names})
    # Evaluation takes minutes per run.
    check_writable(Path(options.output), f"--output {options.output}")
    report = evaluate_runs(runs, Path(options.output), parallel)
    if report is not None:
        print(report_table(report))
        output = Path(options.output)
        plot = " and report.png" if (output / "report.png").exists() else ""
        first = next(iter(runs.values()))
        print(
            closing(
                f"evaluated {plural(len(runs), 'run')}: wrote {output / 'report.json'}, report.html{plot}",
                command("convert", "to-hf", "--checkpoint", first, "--output", first / "huggingface"),
            )
        )
    return 0


def _named_run(text: str) -> tuple[str, Path]:
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise UserError(f"--run is {text}, expected NAME=DIRECTORY")
    return name, Path(directory)
