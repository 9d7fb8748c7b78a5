"""CSV: a column for each language and, if told, one more for the weight; comma or semicolon, quotes where needed.

A first row that is the codes or English names of the languages names the columns; they may then stand in another order
and among others.
"""

import csv
from collections.abc import Iterator

from megatron_prealign.dictionary.formats.base import ENTRIES_AT_ONCE, Entries, Reading, read_lines
from megatron_prealign.dictionary.formats.language_codes import language_called, same_language
from megatron_prealign.dictionary.formats.lines import count_columns, parse_weight
from megatron_prealign.errors import UserError

_WEIGHT = "weight"


def read(reading: Reading) -> Iterator[Entries]:
    """Entries in the order of the file.

    Raises:
        UserError: see `read_lines`; a quote that never ends; a first row of other languages; with `stop` also a row of
            other columns.
    """
    source = reading.source
    names = [*source.languages, *([_WEIGHT] if source.weights else [])]
    places, width = list(range(len(names))), len(names)
    columns: list[list[str]] = [[] for _ in source.languages]
    weights: list[float] = []
    first = True
    for number, row in _rows(reading):
        named = _places(row, names, len(source.languages)) if first else None
        if first and named is None:
            _check_languages(reading, number, row)
        first = False
        if named is not None:
            places, width = named, len(row)
            continue
        try:
            if len(row) != width:
                raise ValueError(f"got {count_columns(len(row))}, expected {width} ({', '.join(names)})")
            weight = parse_weight(row[places[-1]]) if source.weights else 1.0
        except ValueError as error:
            reading.bad(number, str(error), error)
            continue
        for column, place in zip(columns, places, strict=False):
            column.append(row[place])
        weights.append(weight)
        if len(weights) == ENTRIES_AT_ONCE:
            yield Entries(columns, weights if source.weights else None)
            columns, weights = [[] for _ in source.languages], []
    if weights:
        yield Entries(columns, weights if source.weights else None)


def _places(row: list[str], names: list[str], languages: int) -> list[int] | None:
    """The column of each name, of which the first `languages` are codes; None where the row is no header."""
    cells = [cell.strip().lower() for cell in row]
    wanted = [name.lower() for name in names]
    if set(cells) >= set(wanted):
        return [cells.index(name) for name in wanted]
    called = [language_called(cell)[0] for cell in cells]
    places = []
    for name in wanted[:languages]:
        codes = same_language(name)
        places.append(next((place for place, language in enumerate(called) if codes & language), -1))
    places += [cells.index(name) if name in cells else -1 for name in wanted[languages:]]
    return places if -1 not in places and len(set(places)) == len(places) else None


def _check_languages(reading: Reading, number: int, row: list[str]) -> None:
    """Refuses a header of other languages than those declared.

    Codes alone may be words (`to,zu` of an English-German list): one of them has to be a language of the list.
    """
    languages = reading.source.languages
    cells = [cell.strip() for cell in row]
    if reading.source.weights:
        cells = [cell for cell in cells if cell.lower() != _WEIGHT]
    called = [language_called(cell) for cell in cells]
    codes = [codes for codes, _ in called]
    if len(cells) < 2 or not all(codes) or len(set(codes)) < len(codes):
        return
    declared = frozenset().union(*map(same_language, languages))
    if all(is_name for _, is_name in called) or any(each & declared for each in codes):
        raise UserError(
            f"{reading.source.path}:{number}: the first row names the columns {', '.join(cells)}, but the list was "
            f"declared as {'-'.join(languages)}; declare the languages of the columns, or, if that row is words, put a "
            f"row {','.join(languages)} before it"
        )


def _rows(reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with the number of their last line."""
    # Line numbers of the file: those that do not decode are left out, so that the parser's own would be too small.
    place = 0
    delimiter = ""

    def lines() -> Iterator[str]:
        nonlocal place, delimiter
        for number, line in read_lines(reading):
            place = number
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
                    f"{reading.source.path}:{place}: a quotation mark is never closed; write it twice inside quotes"
                ) from error
            reading.bad(place, f"no CSV ({error})", error)
            continue
        if row is None:
            return
        if any(map(str.strip, row)):
            yield place, row


def _delimiter(line: str) -> str:
    """Comma or semicolon, whichever the first row has more of outside quotes."""
    outside = "".join(line.split('"')[::2])
    return ";" if outside.count(";") > outside.count(",") else ","
