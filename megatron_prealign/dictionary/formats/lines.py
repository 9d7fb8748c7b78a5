"""Word lists with one entry per line: two JSON forms, tab-separated columns, space-separated words.

Columns may have a header with the codes or English names of the languages in the declared order, which is skipped.
"""

import json
import re
from collections.abc import Callable, Iterator

import numpy as np
import orjson

from megatron_prealign.dictionary.formats.base import (
    LARGEST_WEIGHT,
    SMALLEST_WEIGHT,
    Entries,
    Reading,
    decode_line,
    empty_file_error,
    read_blocks,
)
from megatron_prealign.dictionary.formats.header import WEIGHT, check_languages, header_indices, other_languages
from megatron_prealign.text import plural

WORDS_SEPARATOR = "$"
_SURROGATE = re.compile("[\ud800-\udfff]")


def read(reading: Reading) -> Iterator[Entries]:
    """Yields the entries of a line-based file in blocks.

    Raises:
        UserError: see `readers.read_entries`.
    """
    reader = _LineReader(reading)
    for number, block in read_blocks(reading.source.path):
        entries = reader.read_columns(number, block) or reader.read_lines(number, block)
        if entries.columns[0]:
            yield entries
    if not reader.num_lines:
        raise empty_file_error(reading.source.path)


def parse_weight(value: object) -> float:
    """Parses a weight given as a number or as text.

    Raises:
        ValueError: the weight is not a number above 0 or out of range.
    """
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        number = 0.0
    if not SMALLEST_WEIGHT <= number <= LARGEST_WEIGHT:
        raise ValueError(f"got weight {value!r}, expected a number above 0 ({SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g})")
    return number


def _split_columns(columns: list[str], languages: int, weights: bool, layout: str) -> tuple[list[str], float]:
    expected = languages + weights
    if len(columns) != expected:
        raise ValueError(f"got {plural(len(columns), 'column')}, expected {expected} {layout}")
    return columns[:languages], parse_weight(columns[languages]) if weights else 1.0


def _parse_tsv(line: str, languages: int, weights: bool) -> tuple[list[str], float]:
    layout = "separated by one tab each, the last a weight" if weights else "separated by one tab"
    return _split_columns(line.split("\t"), languages, weights, layout)


def _parse_space(line: str, languages: int, weights: bool) -> tuple[list[str], float]:
    layout = "words separated by a space" if not weights else "separated by a space, words and a weight"
    return _split_columns(line.split(), languages, weights, f"{layout} (by a tab if a word contains spaces)")


def _parse_json(line: str) -> dict[str, object]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_json_fallback(line)
    if not isinstance(record, dict):
        raise ValueError(f"got a JSON {type(record).__name__}, expected an object")
    return record


def _parse_json_fallback(line: str) -> object:
    """Parses with Python's json, which accepts NaN and lone surrogates, so that the error message can name them."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not valid JSON ({error.msg} at column {error.colno}), expected one JSON object per line"
        ) from error


def _text_of(record: dict[str, object], key: str) -> str:
    if key not in record:
        raise ValueError(
            f'key "{key}" is missing, got {sorted(record)}, expected {{"src_text", "tgt_text"}} or {{"words"}}'
        )
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is {value!r}, expected a string')
    if _SURROGATE.search(value):
        raise ValueError(f'"{key}" is {value!r}, which contains a lone surrogate (half of a \\u pair)')
    return value


def _weight_of(record: dict[str, object]) -> float:
    value = record.get("weight", 1.0)
    if isinstance(value, str):
        raise ValueError(f"got weight {value!r}, expected a number without quotes")
    return parse_weight(value)


def _parse_pairs(line: str, languages: int, weights: bool) -> tuple[list[str], float]:
    record = _parse_json(line)
    return [_text_of(record, "src_text"), _text_of(record, "tgt_text")], _weight_of(record)


def _parse_words(line: str, languages: int, weights: bool) -> tuple[list[str], float]:
    record = _parse_json(line)
    return _text_of(record, "words").split(WORDS_SEPARATOR), _weight_of(record)


# Format -> parser: (line, number of languages, whether there is a weight column) -> (words, weight).
PARSERS: dict[str, Callable[[str, int, bool], tuple[list[str], float]]] = {
    "pairs": _parse_pairs,
    "words": _parse_words,
    "tsv": _parse_tsv,
    "space": _parse_space,
}

# Format -> function that splits a line into columns.
_SPLITTERS: dict[str, Callable[[str], list[str]]] = {"tsv": lambda line: line.split("\t"), "space": str.split}


def detect_format(line: str, columns: int = 2) -> str:
    """Detects the format from the first non-blank line; `columns` is the expected number, including the weight."""
    if line.lstrip().startswith("{"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return "pairs"
        return "words" if isinstance(record, dict) and "words" in record else "pairs"
    return "tsv" if "\t" in line or len(line.split()) != columns else "space"


class _LineReader:
    """Reads blocks of one file; the first line determines the format."""

    def __init__(self, reading: Reading) -> None:
        self._reading, self._source = reading, reading.source
        self._format: str = reading.info.format
        self._columns = len(reading.source.languages) + reading.source.weights
        self.num_lines = 0
        """Number of non-blank lines read."""

    def _set_format(self, format: str) -> None:
        self._format = self._reading.info.format = format

    def read_columns(self, number: int, block: bytes) -> Entries | None:
        """Parses a regular block of tab-separated lines at once; None if the block needs line-by-line parsing."""
        languages, width = len(self._source.languages), self._columns
        text = _decode_block(number, block)
        if text is None:
            return None
        if self._format == "auto":
            first = text.partition("\n")[0]
            if first.strip():
                self._set_format(detect_format(first, width))
        if self._format != "tsv" or not _is_regular(text, width):
            return None
        if not self.num_lines and self._is_header(number, text.partition("\n")[0].split("\t")):
            return None
        fields = text.replace("\n", "\t").split("\t")
        # The empty string after the last line break.
        fields.pop()
        columns = [fields[index::width] for index in range(languages)]
        # A line of white space counts as blank.
        if not all(map(str.strip, columns[0])):
            return None
        weights = None
        if width > languages:
            try:
                weights = [parse_weight(field) for field in fields[languages::width]]
            except ValueError:
                return None
        self.num_lines += len(columns[0])
        return Entries(columns, weights)

    def read_lines(self, first: int, block: bytes) -> Entries:
        """Parses a block line by line."""
        columns: list[list[str]] = [[] for _ in self._source.languages]
        weights: list[float] = []
        lines = block.split(b"\n")
        for number, raw in enumerate(lines if lines[-1] else lines[:-1], start=first):
            try:
                entry = self._read_line(number, raw)
            except ValueError as error:
                reason = f"not valid UTF-8 ({error})" if isinstance(error, UnicodeDecodeError) else str(error)
                # A line that does not decode still means that the file is not empty.
                self.num_lines += isinstance(error, UnicodeDecodeError)
                self._reading.bad_entry(number, reason, error)
                continue
            if entry is not None:
                for column, word in zip(columns, entry[0], strict=True):
                    column.append(word)
                weights.append(entry[1])
        return Entries(columns, weights)

    def _read_line(self, number: int, raw: bytes) -> tuple[list[str], float] | None:
        line = decode_line(number, raw)
        if not line.strip():
            return None
        self.num_lines += 1
        weights, languages = self._source.weights, self._source.languages
        if self._format == "auto":
            self._set_format(detect_format(line, self._columns))
        split = _SPLITTERS.get(self._format)
        if self.num_lines == 1 and split is not None and self._is_header(number, split(line)):
            return None
        words, weight = PARSERS[self._format](line, len(languages), weights)
        if len(words) != len(languages):
            raise ValueError(f"got {plural(len(words), 'word')}, expected {len(languages)} ({'-'.join(languages)})")
        return words, weight

    def _is_header(self, number: int, cells: list[str]) -> bool:
        """Whether the first line is a header with the declared languages.

        Raises:
            UserError: a header with other languages, or with these in another order.
        """
        languages = self._source.languages
        names = [*languages, *([WEIGHT] if self._source.weights else [])]
        indices = header_indices(cells, names, len(languages)) if len(cells) == len(names) else None
        if indices is None:
            check_languages(self._source, number, cells, only_names=True)
        elif indices != sorted(indices):
            raise other_languages(self._source, number, cells)
        return indices is not None


def _decode_block(number: int, block: bytes) -> str | None:
    """Returns the text of a block with \\n line endings; None if the block needs line-by-line parsing."""
    block = block.replace(b"\r\n", b"\n")
    if b"\r" in block:
        return None
    try:
        text = block.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        return None
    return text if text.endswith("\n") else text + "\n"


def _is_regular(text: str, width: int) -> bool:
    """Whether every line has `width` columns."""
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    breaks = data[(data == ord("\t")) | (data == ord("\n"))]
    pattern = np.array([ord("\t")] * (width - 1) + [ord("\n")], dtype=np.uint8)
    return len(breaks) % width == 0 and bool((breaks.reshape(-1, width) == pattern).all())
