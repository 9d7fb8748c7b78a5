"""Writes results.csv, results.md and results.png of a study."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.files.atomic import write_all_atomically
from megatron_prealign.files.directories import writing
from megatron_prealign.study.curves import draw_losses
from megatron_prealign.study.definition import Study
from megatron_prealign.study.matrix import Job
from megatron_prealign.study.results import collect, markdown, to_csv


@dataclass(frozen=True)
class Written:
    """What `write_results` has written."""

    tables: str
    """The tables, in Markdown."""
    files: list[Path]
    jobs: int
    """Number of jobs in the tables."""


def write_results(study: Study, jobs: Sequence[Job], output: Path) -> Written:
    """Writes the results of the jobs that are complete to the directory `output`, all or none.

    Raises:
        UserError: `output` cannot be written to.
    """
    rows, absent = collect(jobs)
    tables = markdown(study, rows, absent)
    figure = draw_losses(study, [job for job in jobs if job.name not in absent])
    targets = [output / "results.csv", output / "results.md", *([output / "results.png"] if figure else [])]
    with writing(targets[0], "results"), write_all_atomically(targets) as temporary:
        temporary[0].write_text(to_csv(rows), encoding="utf-8")
        temporary[1].write_text(tables, encoding="utf-8")
        if figure:
            from megatron_prealign.evaluation.plots import save_png

            save_png(figure, temporary[2])
    return Written(tables, targets, len(jobs) - len(absent))
