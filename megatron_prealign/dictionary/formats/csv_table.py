"""CSV: one column per language and an optional weight column, separated by commas or semicolons, with optional quotes.

A first row with the codes or English names of the languages is a header; the columns may then be in any order and
among others.
"""

import csv
from collections.abc import Iterator

from megatron_prealign.dictionary.formats.base import BLOCK_ENTRIES, Entries, Reading, read_lines
from megatron_prealign.dictionary.formats.language_codes import parse_language, same_language
from megatron_prealign.dictionary.formats.lines import count_columns, parse_weight
from megatron_prealign.errors import UserError

_WEIGHT = "weight"


def read(reading: Reading) -> Iterator[Entries]:
    """Yields entries in file order.

    Raises:
        UserError: see `read_lines`; an unclosed quote; a header with other languages; with `stop` also a row with the
            wrong number of columns.
    """
    source = reading.source
    names = [*source.languages, *([_WEIGHT] if source.weights else [])]
    indices, width = list(range(len(names))), len(names)
    columns: list[list[str]] = [[] for _ in source.languages]
    weights: list[float] = []
    first = True
    for number, row in _rows(reading):
        header = _header_indices(row, names, len(source.languages)) if first else None
        if first and header is None:
            _check_languages(reading, number, row)
        first = False
        if header is not None:
            indices, width = header, len(row)
            continue
        try:
            if len(row) != width:
                raise ValueError(f"got {count_columns(len(row))}, expected {width} ({', '.join(names)})")
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


def _header_indices(row: list[str], names: list[str], languages: int) -> list[int] | None:
    """Column index of each name, the first `languages` of which are language codes; None if the row is not a header."""
    cells = [cell.strip().lower() for cell in row]
    wanted = [name.lower() for name in names]
    if set(cells) >= set(wanted):
        return [cells.index(name) for name in wanted]
    cell_codes = [parse_language(cell)[0] for cell in cells]
    indices = []
    for name in wanted[:languages]:
        codes = same_language(name)
        indices.append(next((index for index, other in enumerate(cell_codes) if codes & other), -1))
    indices += [cells.index(name) if name in cells else -1 for name in wanted[languages:]]
    return indices if -1 not in indices and len(set(indices)) == len(indices) else None


def _check_languages(reading: Reading, number: int, row: list[str]) -> None:
    """Raises if the row is a header with languages other than the declared ones.

    Codes can also be words (`to,zu` in an English-German list), so at least one must be a language of the list.
    """
    languages = reading.source.languages
    cells = [cell.strip() for cell in row]
    if reading.source.weights:
        cells = [cell for cell in cells if cell.lower() != _WEIGHT]
    parsed = [parse_language(cell) for cell in cells]
    codes = [codes for codes, _ in parsed]
    if len(cells) < 2 or not all(codes) or len(set(codes)) < len(codes):
        return
    declared = frozenset().union(*map(same_language, languages))
    if all(is_name for _, is_name in parsed) or any(each & declared for each in codes):
        raise UserError(
            f"{reading.source.path}:{number}: got a header with columns {', '.join(cells)}, expected languages "
            f"{'-'.join(languages)}; declare the languages of the columns, or add a header row {','.join(languages)} "
            "if this row contains words"
        )


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
