"""Writes the results of a study: results.csv, results.md, plots/NAME.png and results.html."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.files.atomic import write_all_atomically
from megatron_prealign.files.directories import make_directories, remove_empty, writing
from megatron_prealign.study.cost import cost_table
from megatron_prealign.study.matrix import word_class_fields
from megatron_prealign.study.page import Origin, render_page
from megatron_prealign.study.plots import DIRECTORY, draw_plots, stale_files
from megatron_prealign.study.records import StudyRecords
from megatron_prealign.study.results import to_csv
from megatron_prealign.study.sweeps import sweep_table
from megatron_prealign.study.tables import Table, result_tables, to_markdown

_OLD_PLOT = "results.png"
"""Plot of losses of earlier versions, in the directory of the study."""


@dataclass(frozen=True)
class Written:
    """What `write_results` has written."""

    tables: str
    """The tables, in Markdown."""
    files: list[Path]
    jobs: int
    """Number of jobs in the tables."""


def write_results(records: StudyRecords, output: Path, origin: Origin) -> Written:
    """Writes the results of the jobs that are complete to the directory `output`, all or none.

    Plots that earlier results had and these do not are removed.

    Raises:
        UserError: `output` cannot be written to.
    """
    tables = study_tables(records)
    text = to_markdown(tables, records.absent)
    plots = draw_plots(records)
    contents: dict[Path, bytes] = {
        output / "results.csv": to_csv(records.rows).encode(),
        output / "results.md": text.encode(),
        **{output / DIRECTORY / f"{plot.name}.png": plot.png for plot in plots},
        output / "results.html": render_page(records, tables, plots, origin).encode(),
    }
    with (
        writing(output / "results.csv", "results"),
        _directory(output / DIRECTORY),
        write_all_atomically(list(contents)) as temporary,
    ):
        for path, content in zip(temporary, contents.values(), strict=True):
            path.write_bytes(content)
    with writing(output / "results.csv", "results"):
        for path in (*stale_files(output, plots), output / _OLD_PLOT):
            path.unlink(missing_ok=True)
    remove_empty([output / DIRECTORY])
    return Written(text, list(contents), len(records.complete))


def study_tables(records: StudyRecords) -> list[Table]:
    """The tables of results.md and results.html."""
    study, rows = records.study, records.rows
    unknown = {(each.job.run, each.job.seed): each.cost.unknown for each in records.complete if each.cost.unknown}
    return [
        *result_tables(study, rows, {job.run: word_class_fields(job.recipe) for job in records.jobs}),
        *(sweep_table(study, name, rows) for name in study.sweeps),
        cost_table(study, rows, unknown),
    ]


@contextmanager
def _directory(path: Path) -> Iterator[None]:
    """Makes a directory, and removes it again if it stays empty."""
    created = make_directories(path)
    try:
        yield
    finally:
        remove_empty(created)
