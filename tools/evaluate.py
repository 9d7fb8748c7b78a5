"""`megatron-prealign evaluate`: measures trained runs and writes the report."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import PathText


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measures the newest checkpoint of each run and writes report.json, report.html and report.png."""

    run: list[str]
    """Runs as NAME=DIRECTORY, one or more; the first is what the others are compared with."""
    output: PathText
    """Directory of the report."""
    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices; need not be as in training."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the stack of layers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run."""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments behind its name."""
    options = parse_options(EvaluateOptions, "evaluate", argv)
    runs = dict(_named_run(text) for text in options.run)
    if len(runs) != len(options.run):
        raise UserError(f"--run names are {', '.join(options.run)}, expected every name once")

    from megatron_prealign.runtime import log

    log.configure()
    from megatron_prealign.evaluation.report import report_table
    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.recipe.load import as_user_error
    from megatron_prealign.run.evaluate import evaluate_runs

    with as_user_error("megatron-prealign evaluate"):
        parallel = ParallelSection(
            tensor_model_parallel_size=options.tensor_model_parallel_size,
            pipeline_model_parallel_size=options.pipeline_model_parallel_size,
            device=options.device,
        )
    report = evaluate_runs(runs, Path(options.output), parallel)
    if report is not None:
        print(report_table(report))
        print(f"wrote {Path(options.output) / 'report.json'}, report.html and report.png")
    return 0


def _named_run(text: str) -> tuple[str, Path]:
    name, equals, directory = text.partition("=")
    if not (name and equals and directory):
        raise UserError(f"--run is {text}, expected NAME=DIRECTORY")
    return name, Path(directory)
