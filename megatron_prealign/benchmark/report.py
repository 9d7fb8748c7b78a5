"""Formats measurements as tables for the terminal and as CSV files."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_prealign.benchmark.code_switch import Measurement
from megatron_prealign.benchmark.contrastive import ContrastiveMeasurement
from megatron_prealign.benchmark.convert import ConvertMeasurement
from megatron_prealign.benchmark.preprocess import PreprocessMeasurement
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.text import align, plural

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

_CONTRASTIVE_HEADINGS = (
    "implementation",
    "ms/call",
    "p10",
    "p90",
    "fastest",
    "TFLOP/s",
    "peak MiB",
    "x eager",
    "x compiled",
    "most words",
)


def case_table(measured: Sequence[Measurement]) -> list[str]:
    """Formats the measurements of one case."""
    case = measured[0]
    lines = [
        f"{case.rows} x {case.sequence}, ratio {case.ratio:g}, lookahead {case.lookahead}, {case.token_dtype} tokens: "
        f"{case.known_share:.1%} of running words in the table, {case.switched_share:.1%} switched, "
        f"{case.bytes_moved / (case.rows * case.sequence):.1f} bytes per token"
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


def contrastive_table(measured: Sequence[ContrastiveMeasurement]) -> list[str]:
    """Formats the measurements of one case of the contrastive loss."""
    case = measured[0]
    cells = [
        (
            each.implementation,
            *(_number(_scaled(value, 1e3)) for value in (each.median_us, each.p10_us, each.p90_us, each.fastest_us)),
            _number(each.teraflops),
            _number(_scaled(each.peak_bytes, 1 << 20)),
            _number(each.times_eager),
            _number(each.times_compiled),
            "-" if each.largest_words is None else f"{each.largest_words:,}",
        )
        for each in measured
    ]
    size = f"{plural(case.words, 'word')} x {case.hidden}, {plural(case.layers, 'layer')}, {case.dtype}:"
    return [size, *align([_CONTRASTIVE_HEADINGS, *cells])]


# Column -> width. Fixed, because each row is printed as soon as it is measured, which may take minutes.
_PREPROCESS_COLUMNS = {
    "implementation": 14,
    "encoded by": 14,
    "workers": 7,
    "MB of text": 10,
    "documents": 12,
    "seconds": 9,
    "MB/s": 8,
    "M tokens/s": 10,
    "peak MiB": 9,
}


_CONVERT_COLUMNS = {
    "operation": 10,
    "reads": 10,
    "GB": 8,
    "s": 8,
    "GB/s": 7,
    "of cp": 7,
    "memory MiB": 11,
    "bound MiB": 10,
}


def preprocess_header() -> str:
    """Column titles for `preprocess_line`."""
    return _fixed_width(list(_PREPROCESS_COLUMNS), _PREPROCESS_COLUMNS.values())


def preprocess_line(measurement: PreprocessMeasurement) -> str:
    """Formats one measurement of preprocessing."""
    cells = [
        measurement.implementation,
        measurement.encoded_by,
        str(measurement.workers),
        f"{measurement.text_bytes / 1e6:,.1f}",
        f"{measurement.documents:,}",
        f"{measurement.seconds:,.2f}",
        f"{measurement.mb_per_second:,.2f}",
        f"{measurement.tokens_per_second / 1e6:,.2f}",
        f"{measurement.peak_bytes / (1 << 20):,.0f}",
    ]
    return _fixed_width(cells, _PREPROCESS_COLUMNS.values())


def convert_header() -> str:
    """Column titles for `convert_line`."""
    return _fixed_width(list(_CONVERT_COLUMNS), _CONVERT_COLUMNS.values())


def convert_line(measurement: ConvertMeasurement) -> str:
    """Formats one measurement of conversion."""
    memory = [measurement.memory_bytes, measurement.bound_bytes]
    cells = [
        measurement.operation,
        measurement.source,
        f"{measurement.bytes / 1e9:,.2f}",
        f"{measurement.seconds:,.2f}",
        f"{measurement.gb_per_second:,.2f}",
        f"{measurement.share_of_cp:.0%}",
        *("-" if value is None else f"{value / (1 << 20):,.0f}" for value in memory),
    ]
    return _fixed_width(cells, _CONVERT_COLUMNS.values())


def _fixed_width(cells: Sequence[str], widths: Iterable[int]) -> str:
    """Joins the cells, the first two aligned left and the others right."""
    return "  ".join(
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def write_csv(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows with identical columns; floats with six significant digits, None as an empty cell."""
    rows = list(rows)
    with write_atomically(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _rounded(value) for name, value in row.items()})


def _rounded(value: Any) -> Any:
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else value
