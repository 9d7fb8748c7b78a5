"""`megatron-prealign study`: trains, resumes and tabulates a matrix of runs and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.files.yaml_text import read_utf8
from megatron_prealign.recipe.describe import PathText
from megatron_prealign.text import align, closing, command, plural

if TYPE_CHECKING:
    from megatron_prealign.study.definition import Study
    from megatron_prealign.study.matrix import Job
    from megatron_prealign.study.page import Origin


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Trains every run of a study with every seed, and writes tables, plots and a page: results.csv, results.md,
    plots/NAME.png and results.html.

    Rerun the same command to resume. A run that fails does not end the others.
    """

    config: PathText
    """Study in YAML: recipes, runs, seeds, output directory."""
    quick: bool = False
    """Apply the study's section `quick`: fewer seeds, runs or tokens, in an output directory of their own."""
    status: bool = False
    """Print how far each run is, and exit."""
    tables: bool = False
    """Write tables and plots of the runs that are complete, and exit; also while the study trains."""


def main(argv: Sequence[str]) -> int:
    """Runs `megatron-prealign study` with the arguments `argv`."""
    options = parse_options(StudyOptions, "study", argv)
    from megatron_prealign.study.definition import load_study
    from megatron_prealign.study.matrix import build_jobs, write_recipes
    from megatron_prealign.study.page import Origin

    study = load_study(options.config, quick=options.quick)
    again = command("study", "--config", options.config, *(["--quick"] if options.quick else []))
    # Now: in the hours of training, the file may change.
    origin = Origin(again, options.config, read_utf8(Path(options.config)))
    jobs = build_jobs(study)
    if options.status:
        _print_status(jobs)
        return 0
    if options.tables:
        _write_tables(study, jobs, origin)
        return 0
    from megatron_prealign.files.directories import check_writable
    from megatron_prealign.files.lock import LockHeldError, file_lock
    from megatron_prealign.run.missing_files import check_inputs_exist

    for job in jobs[: len(study.runs)]:
        # Once per run, the seeds of which read the same.
        check_inputs_exist(job.recipe)
    output = Path(study.output)
    check_writable(output, f"output {output}")
    output.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(output / ".study.lock", wait=False):
            write_recipes(jobs)
            return _train(study, jobs, origin)
    except LockHeldError as error:
        raise UserError(
            f"output {output} is in use by another study ({error}); wait for it, stop it, or set another output"
        ) from error


def _train(study: "Study", jobs: Sequence["Job"], origin: "Origin") -> int:
    from megatron_prealign.resources import visible_gpus
    from megatron_prealign.study.execution import train_all

    try:
        gpus = visible_gpus() if any(job.recipe.parallel.device != "cpu" for job in jobs) else []
        unfinished = train_all(jobs, study.processes, lambda line: print(line, flush=True), gpus=gpus)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; runs resume from their last checkpoints; continue with: {origin.command}"
        ) from None
    _write_tables(study, jobs, origin)
    if unfinished:
        logs = ", ".join(f"{job.name} ({job.directory.with_suffix('.log')})" for job in unfinished)
        raise UserError(
            f"{plural(len(unfinished), 'run')} not complete: {logs}; fix the cause and run {origin.command}"
        )
    return 0


def _write_tables(study: "Study", jobs: Sequence["Job"], origin: "Origin") -> None:
    from megatron_prealign.study.output import write_results
    from megatron_prealign.study.records import read_records

    output = Path(study.output)
    written = write_results(read_records(study, jobs), output, origin)
    print(written.tables, end="")
    plots = sum(path.suffix == ".png" for path in written.files)
    made = f"wrote {output / 'results.html'}, results.md, results.csv and {plural(plots, 'plot')}"
    print(closing(f"{made} from {plural(written.jobs, 'run')}"))


def _print_status(jobs: Sequence["Job"]) -> None:
    from megatron_prealign.study.execution import progress

    each = [progress(job) for job in jobs]
    rows = [["run", "state", "step", "tokens"]]
    rows += [[one.job.name, one.state, f"{one.step:,}", f"{one.tokens:,}"] for one in each]
    print("\n".join(align(rows)))
    print(f"{sum(one.state == 'complete' for one in each)} of {plural(len(each), 'run')} complete")
