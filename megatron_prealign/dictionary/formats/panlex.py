"""PanLex as CSV files: `langvar.csv`, `expr.csv` and `denotation.csv` of its database, in one directory.

Two expressions are translations of each other if they share a meaning. Every meaning is one entry of one source, so the
weight of a pair is the number of shared meanings: pairs that occur in many dictionaries weigh more.

A language code selects the standard variety (number 0); `zh_hant` is variety 1 of Mandarin, and any other variety is
written as its three-letter code and number, such as `cmn_001`.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.formats.base import DictionaryInput, Entries, Reading, read_blocks, read_lines
from megatron_prealign.dictionary.formats.language_codes import TRADITIONAL, same_language
from megatron_prealign.dictionary.ragged import offsets_of, row_indices
from megatron_prealign.errors import UserError
from megatron_prealign.text import plural

_COMPRESSED = ("", ".gz", ".zst", ".bz2")
_VARIETY = re.compile(r"([a-z]{3})_(\d{3})")
# A meaning with more expressions in one language is an enumeration, not a word.
_MAX_EXPRESSIONS = 64


def read(reading: Reading) -> Iterator[Entries]:
    """Yields pairs of the first language with each other language, by headword in the order of `expr.csv`, then by
    descending weight.

    Raises:
        UserError: a file, column or language is missing, or there are no translations; with `stop` also a malformed
            line.
    """
    directory = reading.source.path if reading.source.path.is_dir() else reading.source.path.parent
    varieties = _varieties(reading, directory)
    texts: list[str] = []
    languages: list[int] = []
    ids: list[int] = []
    for number, row in _rows(reading, directory, "expr.csv", ("id", "langvar", "txt")):
        language = varieties.get(row[1])
        if language is None:
            continue
        if not (row[0].isascii() and row[0].isdigit() and len(row[0]) < 19):
            reading.bad_entry(f"expr.csv:{number}", f"got id {row[0]!r}, expected a number")
            continue
        ids.append(int(row[0]))
        languages.append(language)
        texts.append(row[2])
    meaning, expression = _denotations(reading, directory, np.array(ids, dtype=np.int64))
    language_of = np.array(languages, dtype=np.int64)[expression] if len(expression) else expression
    names = reading.source.languages
    num_pairs = 0
    for target in range(1, len(names)):
        left, right, weight = _pairs(meaning, expression, language_of, target)
        num_pairs += len(left)
        if len(left):
            columns = [[texts[index] for index in side.tolist()] for side in (left, right)]
            yield Entries(columns, weight.tolist(), (names[0], names[target]))
    if not num_pairs:
        raise UserError(
            f"{directory}: no meaning has words of both {names[0]} and {' or '.join(names[1:])}; check the languages"
        )
    reading.info.title = "PanLex"


def _file(directory: Path, name: str) -> Path:
    existing = next((path for ending in _COMPRESSED if (path := directory / (name + ending)).is_file()), None)
    if existing is None:
        raise UserError(f"{directory}: {name} is missing, expected langvar.csv, expr.csv and denotation.csv of PanLex")
    return existing


def _rows(reading: Reading, directory: Path, name: str, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields the named columns of each row, with the number of the row's last line."""
    path = _file(directory, name)
    source = DictionaryInput(path=path, languages=reading.source.languages)
    file_reading = Reading(source, reading.errors, reading.on_error, reading.info)
    line_number = 0

    def lines() -> Iterator[str]:
        nonlocal line_number
        for number, line in read_lines(file_reading):
            line_number = number
            yield f"{line}\n"

    parser = csv.reader(lines())
    indices: list[int] | None = None
    while True:
        try:
            row = next(parser, None)
        except csv.Error as error:
            file_reading.bad_entry(line_number, f"not valid CSV ({error})", error)
            continue
        if row is None:
            return
        if indices is None:
            indices = _column_indices(path, row, columns)
        elif len(row) > max(indices):
            yield line_number, [row[each] for each in indices]
        elif row:
            got = plural(len(row), "column")
            file_reading.bad_entry(line_number, f"got {got}, expected {max(indices) + 1} or more")


def _column_indices(path: Path, header: list[str], columns: Sequence[str]) -> list[int]:
    missing = [column for column in columns if column not in header]
    if missing:
        raise UserError(
            f"{path}:1: column {', '.join(missing)} is missing, got {', '.join(header)[:120]!r}, expected the header "
            "of a PanLex CSV file"
        )
    return [header.index(column) for column in columns]


def _varieties(reading: Reading, directory: Path) -> dict[str, int]:
    """Variety id -> index of its language in the input's languages."""
    wanted: dict[tuple[str, int], int] = {}
    for index, language in enumerate(reading.source.languages):
        code = language.lower()
        variety = _VARIETY.fullmatch(code)
        if variety:
            wanted[variety[1], int(variety[2])] = index
        else:
            wanted |= {(each, int(code in TRADITIONAL)): index for each in same_language(code)}
    varieties = {
        identity: wanted[code, int(number)]
        for _, (identity, code, number) in _rows(reading, directory, "langvar.csv", ("id", "lang_code", "var_code"))
        if number.isascii() and number.isdigit() and (code, int(number)) in wanted
    }
    missing = [name for index, name in enumerate(reading.source.languages) if index not in varieties.values()]
    if missing:
        raise UserError(
            f"{directory}: langvar.csv has no variety of {', '.join(missing)}; write it as three-letter code and "
            "variety number, such as deu_000"
        )
    return varieties


def _denotations(
    reading: Reading, directory: Path, ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Meaning and index into `ids` of every denotation of a wanted expression."""
    order = np.argsort(ids, kind="stable")
    known = ids[order]
    meanings, expressions = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    path = _file(directory, "denotation.csv")
    indices: list[int] | None = None
    width = 0
    for first, block in read_blocks(path):
        if indices is None:
            header, _, block = block.partition(b"\n")
            names = header.decode("utf-8-sig", "replace").strip().split(",")
            indices, width = _column_indices(path, names, ("meaning", "expr")), len(names)
            first += 1
        numbers = _parse_numbers(reading, path, first, block, width)
        if not len(known) or not len(numbers):
            continue
        meaning, expression = numbers[:, indices[0]], numbers[:, indices[1]]
        match = np.minimum(np.searchsorted(known, expression), len(known) - 1)
        chosen = known[match] == expression
        meanings.append(meaning[chosen])
        expressions.append(order[match[chosen]])
    return np.concatenate(meanings), np.concatenate(expressions)


def _parse_numbers(reading: Reading, path: Path, first: int, block: bytes, width: int) -> NDArray[np.int64]:
    """Parses the rows of a block of numbers into `[rows, width]`."""
    data = np.frombuffer(block if block.endswith(b"\n") else block + b"\n", dtype=np.uint8)
    ends = np.flatnonzero((data == ord(",")) | (data == ord("\n")))
    pattern = np.array([ord(",")] * (width - 1) + [ord("\n")], dtype=np.uint8)
    digits = np.diff(ends, prepend=-1) - 1
    regular = (
        np.isin(data, np.frombuffer(b"0123456789,\n", dtype=np.uint8)).all()
        and len(ends) % width == 0
        and (data[ends].reshape(-1, width) == pattern).all()
        # Any 18-digit number fits into 64 bits.
        and ((digits > 0) & (digits < 19)).all()
    )
    if regular:
        fields = data.tobytes().replace(b"\n", b",").split(b",")[:-1]
        return np.array(fields, dtype=np.bytes_).astype(np.int64).reshape(-1, width)
    rows = []
    for number, line in enumerate(block.split(b"\n"), start=first):
        fields = [field.strip(b' "\r') for field in line.split(b",")]
        if len(fields) == width and all(field.isdigit() and len(field) < 19 for field in fields):
            rows.append([int(field) for field in fields])
        elif line.strip():
            reading.bad_entry(f"{path.name}:{number}", f"got {line[:60]!r}, expected {width} numbers")
    return np.array(rows, dtype=np.int64).reshape(-1, width)


def _pairs(
    meaning: NDArray[np.int64], expression: NDArray[np.int64], language: NDArray[np.int64], target: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Expressions of the first and the target language that share meanings, and the number of shared meanings."""
    sides = []
    for side in (0, target):
        chosen = np.flatnonzero(language == side)
        both = np.unique(np.stack([meaning[chosen], expression[chosen]], axis=1), axis=0)
        _, number, counts = np.unique(both[:, 0], return_inverse=True, return_counts=True)
        sides.append(both[(counts <= _MAX_EXPRESSIONS)[number.reshape(-1)]])
    left, right = sides
    starts, counts = np.unique(right[:, 0], return_counts=True)
    match = np.searchsorted(starts, left[:, 0])
    match = np.minimum(match, max(len(starts) - 1, 0))
    shared = starts[match] == left[:, 0] if len(starts) else np.zeros(len(left), dtype=bool)
    left, match = left[shared], match[shared]
    index, offsets = row_indices(offsets_of(counts), match)
    pairs = np.stack([np.repeat(left[:, 1], np.diff(offsets)), right[index, 1]], axis=1)
    pairs, weight = np.unique(pairs, axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], -weight, pairs[:, 0]))
    return pairs[order, 0], pairs[order, 1], weight[order]
