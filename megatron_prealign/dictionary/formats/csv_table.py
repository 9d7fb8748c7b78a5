"""CSV: one column per language and an optional weight column, separated by commas or semicolons, with optional quotes.

A first row with the codes or English names of the languages is a header; the columns may then be in any order and
among others.
"""

import csv
from collections.abc import Iterator

from megatron_prealign.dictionary.formats.base import BLOCK_ENTRIES, Entries, Reading, read_lines
from megatron_prealign.dictionary.formats.header import WEIGHT, check_languages, header_indices
from megatron_prealign.dictionary.formats.lines import parse_weight
from megatron_prealign.errors import UserError
from megatron_prealign.text import plural


def read(reading: Reading) -> Iterator[Entries]:
    """Yields entries in file order.

    Raises:
        UserError: see `read_lines`; an unclosed quote; a header with other languages; with `stop` also a row with the
            wrong number of columns.
    """
    source = reading.source
    names = [*source.languages, *([WEIGHT] if source.weights else [])]
    indices, width = list(range(len(names))), len(names)
    columns: list[list[str]] = [[] for _ in source.languages]
    weights: list[float] = []
    first = True
    for number, row in _rows(reading):
        header = header_indices(row, names, len(source.languages)) if first else None
        if first and header is None:
            check_languages(source, number, row)
        first = False
        if header is not None:
            indices, width = header, len(row)
            continue
        try:
            if len(row) != width:
                raise ValueError(f"got {plural(len(row), 'column')}, expected {width} ({', '.join(names)})")
            weight = parse_weight(row[indices[-1]]) if source.weights else 1.0
        except ValueError as error:
            reading.bad_entry(number, str(error), error)
            continue
        for column, index in zip(columns, indices, strict=False):
            column.append(row[index])
        weights.append(weight)
        if len(weights) == BLOCK_ENTRIES:
            yield Entries(columns, weights if source.weights else None)
            columns, weights = [[] for _ in source.languages], []
    if weights:
        yield Entries(columns, weights if source.weights else None)


def _rows(reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """Yields non-blank rows with the number of their last line."""
    # csv.reader's own line number would be too small, because lines that do not decode are skipped before it.
    line_number = 0
    delimiter = ""

    def lines() -> Iterator[str]:
        nonlocal line_number, delimiter
        for number, line in read_lines(reading):
            line_number = number
            delimiter = delimiter or (_delimiter(line) if line.strip() else "")
            yield f"{line}\n"

    source = lines()
    first = next((line for line in source if line.strip()), None)
    if first is None:
        return

    def all_lines() -> Iterator[str]:
        yield first
        yield from source

    parser = csv.reader(all_lines(), delimiter=delimiter, strict=True)
    while True:
        try:
            row = next(parser, None)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(
                    f"{reading.source.path}:{line_number}: unclosed quotation mark; write it twice inside quotes"
                ) from error
            reading.bad_entry(line_number, f"not valid CSV ({error})", error)
            continue
        if row is None:
            return
        if any(map(str.strip, row)):
            yield line_number, row


def _delimiter(line: str) -> str:
    """Comma or semicolon, whichever is more frequent outside quotes in the first row."""
    outside = "".join(line.split('"')[::2])
    return ";" if outside.count(";") > outside.count(",") else ","
