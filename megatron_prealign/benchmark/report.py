"""Tables for the terminal and CSV files."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prealign.benchmark.code_switch import Measurement
from megatron_prealign.data.files import write_atomically

_DIGITS = 6
_HEADINGS = (
    "implementation",
    "L2",
    "us/call",
    "p10",
    "p90",
    "M tokens/s",
    "GB/s",
    "of copy",
    "x reference",
    "x Python loop",
    "host us",
)


def case_table(measured: Sequence[Measurement]) -> list[str]:
    """The measurements of one case."""
    case = measured[0]
    lines = [
        f"{case.rows} x {case.sequence}, ratio {case.ratio:g}, lookahead {case.lookahead}, {case.token_dtype} tokens: "
        f"{case.known_share:.1%} of the running words known, {case.switched_share:.1%} switched, "
        f"{case.bytes_moved / (case.rows * case.sequence):.1f} bytes a token"
    ]
    cells = [
        (
            each.implementation,
            each.l2 or "-",
            f"{each.median_us:,.1f}",
            f"{each.p10_us:,.1f}",
            f"{each.p90_us:,.1f}",
            f"{each.tokens_per_second / 1e6:,.2f}",
            f"{each.gb_per_second:,.2f}",
            f"{each.share_of_copy:.1%}",
            _number(each.times_reference),
            _number(each.times_python_loop),
            _number(each.host_us),
        )
        for each in measured
    ]
    return [*lines, *align([_HEADINGS, *cells])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, the first one to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows that have the same columns; floats with six digits, None as an empty cell."""
    rows = list(rows)
    with write_atomically(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _rounded(value) for name, value in row.items()})


def _rounded(value: Any) -> Any:
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else value
