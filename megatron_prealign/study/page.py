"""The page of a study: all tables and plots, its definition, and how it was made, in one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from megatron_prealign import page
from megatron_prealign.evaluation.plots import PNG_DPI
from megatron_prealign.study.plots import Plot
from megatron_prealign.study.records import StudyRecords
from megatron_prealign.study.tables import Table, not_in_tables

_STYLE = """
pre { background: var(--panel); padding: 1rem; border-radius: 6px; overflow-x: auto; font-size: .82rem;
  line-height: 1.45 }
td.text { font-family: ui-monospace, monospace; font-size: .85rem }
td:first-child:not(.text) { white-space: nowrap }
figcaption { margin-top: .5rem }
"""


@dataclass(frozen=True)
class Origin:
    """Where the results come from."""

    command: str
    """Command line that trains, resumes and tabulates the study."""
    path: str
    """File of the study."""
    definition: str
    """Text of that file."""


def render_page(records: StudyRecords, tables: Sequence[Table], plots: Sequence[Plot], origin: Origin) -> str:
    """Renders the page.

    Args:
        tables: In the order of results.md; the plot of a sweep follows its table.
    """
    study = records.study
    of_sweep = {f"Sweep: {plot.sweep}": plot for plot in plots if plot.sweep is not None}
    parts = [f"<h1>Study: {escape(study.output)}</h1>", _lead(records)]
    first, *others = tables
    parts += [_table(first), *(_plot(plot) for plot in plots if plot.sweep is None)]
    for table in others:
        parts.append(_table(table))
        if table.title in of_sweep:
            parts.append(_plot(of_sweep[table.title]))
    parts += [_recipes(records), _origin(origin)]
    return page.render(f"Study: {study.output}", "\n".join(parts), style=_STYLE, images=True)


def _lead(records: StudyRecords) -> str:
    study = records.study
    seeds = ", ".join(map(str, study.seeds))
    text = (
        f"{len(records.complete)} of {len(records.jobs)} runs are complete: {len(study.runs)} recipes, each with the "
        f"seeds {seeds}."
    )
    lead = f'<p class="lead">{escape(text)}</p>'
    return f'{lead}\n<p class="note">{escape(not_in_tables(records.absent))}</p>' if records.absent else lead


def _table(table: Table) -> str:
    rows = [[escape(cell) for cell in row] for row in table.rows]
    return (
        f'<h2>{escape(table.title)}</h2>\n{page.table(table.header, rows)}\n<p class="note">{escape(table.caption)}</p>'
    )


def _plot(plot: Plot) -> str:
    return page.image(plot.title, plot.png, escape(plot.caption), level=3 if plot.sweep else 2, dpi=PNG_DPI)


def _recipes(records: StudyRecords) -> str:
    rows = [
        [
            escape(job.name),
            escape(str(job.recipe_file)),
            escape(records.absent.get(job.name, "complete")),
        ]
        for job in records.jobs
    ]
    return f"<h2>Recipes</h2>\n{page.table(['Run', 'recipe', 'state'], rows, text=True)}"


def _origin(origin: Origin) -> str:
    return (
        f"<h2>Command</h2>\n<pre>{escape(origin.command)}</pre>\n"
        f"<h2>Definition</h2>\n<p><code>{escape(origin.path)}</code></p>\n<pre>{escape(origin.definition)}</pre>"
    )
