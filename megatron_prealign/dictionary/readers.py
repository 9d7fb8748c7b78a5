"""Reads word lists: which words stand for each other in which languages, and where a file is broken.

Formats: JSON lines `{"src_text": "apple", "tgt_text": "苹果"}`, JSON lines `{"words": "bank $ 银行 $ banque"}`, two
columns separated by a tab, two words separated by a space (MUSE). Any of them may be gzip-compressed. JSON may carry a
"weight", lists in columns have it in a third column if so told.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Literal, cast

import numpy as np
import orjson

from megatron_prealign.errors import UserError

FileFormat = Literal["auto", "pairs", "words", "tsv", "space"]
OnError = Literal["stop", "skip"]

MAX_LISTED_ERRORS = 100
# What a 32-bit float holds with room to add many.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-30, 1e30
_BLOCK_BYTES = 1 << 22
LANGUAGES_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(-[A-Za-z][A-Za-z0-9_]*)+")
WORDS_SEPARATOR = "$"
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class DictionaryInput:
    """One word-list file.

    Attributes:
        path: the file, plain or gzip.
        languages: language code of every column; the first is the source language.
        format: `auto` looks at the content; the others force one format.
        licence: name of the list's licence, kept in the table ("" if not told).
        weights: whether lists in columns have one more, the weight of the pair.
    """

    path: Path
    languages: tuple[str, ...]
    format: FileFormat = "auto"
    licence: str = ""
    weights: bool = False


@dataclass(frozen=True)
class Entries:
    """Entries of a file, column by column.

    Attributes:
        columns: the words of each language, equally many, as they stand in the file.
        weights: weight of each entry; None where all are 1.
    """

    columns: list[list[str]]
    weights: list[float] | None


@dataclass
class ReadErrors:
    """Lines that could not be read; only the first ones are listed."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < MAX_LISTED_ERRORS:
            self.first.append(message)


def parse_languages(text: str, where: str) -> tuple[str, ...]:
    """`"en-de"` as `("en", "de")`.

    Raises:
        UserError: not two or more different codes joined by hyphens.
    """
    codes = tuple(text.split("-"))
    if not LANGUAGES_PATTERN.fullmatch(text) or len(set(codes)) != len(codes):
        raise UserError(
            f"{where}: languages {text!r}, expected two or more different codes joined by '-', source first, "
            "such as en-de (letters, digits and '_' in a code)"
        )
    return codes


def parse_input(
    text: str,
    default_languages: str | None = None,
    format: FileFormat = "auto",
    licence: str = "",
    weights: bool = False,
) -> DictionaryInput:
    """Splits `FILE[:en-de]`; a colon that belongs to the file's name is left alone.

    Raises:
        UserError: no languages given for this file, here or as the default.
    """
    path, colon, suffix = text.rpartition(":")
    if colon and LANGUAGES_PATTERN.fullmatch(suffix) and not Path(text).exists():
        languages = parse_languages(suffix, f"--input {text}")
    else:
        path = text
        if default_languages is None:
            file = text.partition(":")[0]
            raise UserError(
                f"--input {text}: no languages given, expected FILE:SOURCE-TARGET such as {file}:en-de, "
                "or --languages en-de for all files"
            )
        languages = parse_languages(default_languages, "--languages")
    return DictionaryInput(path=Path(path), languages=languages, format=format, licence=licence, weights=weights)


def _open(path: Path) -> BufferedReader:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read this dictionary file: {error.strerror}") from error
    is_gzip = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    # What decides is the content: files are often renamed without being recompressed.
    return cast(BufferedReader, gzip.GzipFile(fileobj=stream)) if is_gzip else stream


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines, many at a time, with the number of the first, from 1; an archive's mistakes name its last line."""
    number, begun = 1, b""
    with _open(path) as stream:
        while True:
            try:
                data = stream.read1(_BLOCK_BYTES)
            except (EOFError, zlib.error, OSError) as error:
                last = number + begun.count(b"\n") - 1
                raise UserError(
                    f"{path}:{last}: the gzip archive is damaged or cut off behind this line ({error}); fetch it again"
                ) from error
            begun += data
            if data and len(begun) < _BLOCK_BYTES:
                continue
            end = begun.rfind(b"\n") + 1 if data else len(begun)
            block, begun = begun[:end], begun[end:]
            if block:
                yield number, block
                number += block.count(b"\n")
            if not data:
                return


def _weight(value: object) -> float:
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else 0.0
    except (ValueError, OverflowError):
        number = 0.0
    if not SMALLEST_WEIGHT <= number <= LARGEST_WEIGHT:
        raise ValueError(
            f"the weight is {value!r}, expected a number above 0 ({SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g})"
        )
    return number


def _split_columns(columns: list[str], weights: bool, how: str) -> tuple[list[str], float]:
    expected = 3 if weights else 2
    if len(columns) != expected:
        raise ValueError(f"got {_columns(len(columns))}, expected {expected} {how}")
    return columns[:2], _weight(columns[2]) if weights else 1.0


def _parse_tsv(line: str, weights: bool) -> tuple[list[str], float]:
    how = "separated by one tab each, the third a weight" if weights else "separated by one tab"
    return _split_columns(line.split("\t"), weights, how)


def _parse_space(line: str, weights: bool) -> tuple[list[str], float]:
    how = "words separated by a space" if not weights else "separated by a space, two words and a weight"
    return _split_columns(line.split(), weights, f"{how} (by a tab if a word contains spaces)")


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _parse_json(line: str) -> dict[str, object]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        record = _parse_json_slowly(line)
    if not isinstance(record, dict):
        raise ValueError(f"got a JSON {type(record).__name__}, expected an object")
    return record


def _parse_json_slowly(line: str) -> object:
    """JSON as Python takes it, NaN and half a \\u pair included, so that the message can name them."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}), expected one JSON object a line") from error


def _text_of(record: dict[str, object], key: str) -> str:
    if key not in record:
        raise ValueError(
            f'no "{key}" among the keys {sorted(record)}, expected {{"src_text", "tgt_text"}} or {{"words"}}'
        )
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is {value!r}, expected a string')
    if _SURROGATE.search(value):
        raise ValueError(f'"{key}" is {value!r}, which holds half of a \\u pair and is no text')
    return value


def _weight_of(record: dict[str, object]) -> float:
    value = record.get("weight", 1.0)
    if isinstance(value, str):
        raise ValueError(f"the weight is {value!r}, expected a number without quotes")
    return _weight(value)


def _parse_pairs(line: str, weights: bool) -> tuple[list[str], float]:
    record = _parse_json(line)
    return [_text_of(record, "src_text"), _text_of(record, "tgt_text")], _weight_of(record)


def _parse_words(line: str, weights: bool) -> tuple[list[str], float]:
    record = _parse_json(line)
    return _text_of(record, "words").split(WORDS_SEPARATOR), _weight_of(record)


# Format -> (line, whether columns have a weight) -> words and weight.
PARSERS: dict[str, Callable[[str, bool], tuple[list[str], float]]] = {
    "pairs": _parse_pairs,
    "words": _parse_words,
    "tsv": _parse_tsv,
    "space": _parse_space,
}


def detect_format(line: str, weights: bool = False) -> str:
    """Format of a file from its first line that is not blank; `weights`: columns have one more, the weight."""
    if line.lstrip().startswith("{"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return "pairs"
        return "words" if isinstance(record, dict) and "words" in record else "pairs"
    return "tsv" if "\t" in line or len(line.split()) != (3 if weights else 2) else "space"


def read_entries(source: DictionaryInput, errors: ReadErrors, on_error: OnError = "stop") -> Iterator[Entries]:
    """Yields the words of every line, many lines at a time.

    Args:
        source: the file and its languages.
        errors: gets every line left out (only with `on_error="skip"`).
        on_error: `stop` raises at the first bad line, `skip` counts it and goes on.

    Raises:
        UserError: a file that cannot be opened or holds nothing, a damaged archive; with `stop` also a bad line
            (`file:line`, what it holds, what was expected).
    """
    reader = _LineReader(source, errors, on_error)
    for number, block in _blocks(source.path):
        entries = reader.read_columns(number, block) or reader.read_lines(number, block)
        if entries.columns[0]:
            yield entries
    if not reader.seen:
        raise UserError(f"{source.path}: the file is empty, expected one entry a line")


class _LineReader:
    """Reads blocks of one file; its first line decides the format."""

    def __init__(self, source: DictionaryInput, errors: ReadErrors, on_error: OnError) -> None:
        self._source, self._errors, self._on_error = source, errors, on_error
        self._format: str = source.format
        self.seen = 0
        """Lines that were not blank."""

    def read_columns(self, number: int, block: bytes) -> Entries | None:
        """A block of tab-separated lines without anything odd, all at once; None for any other."""
        width = 3 if self._source.weights else 2
        text = _decode_block(number, block)
        if text is None or len(self._source.languages) != 2:
            return None
        if self._format == "auto":
            first = text.partition("\n")[0]
            if first.strip():
                self._format = detect_format(first, self._source.weights)
        if self._format != "tsv" or not _is_regular(text, width):
            return None
        fields = text.replace("\n", "\t").split("\t")
        # Behind the last line break.
        fields.pop()
        columns = [fields[0::width], fields[1::width]]
        # A line of white space is no entry but a blank line.
        if not all(map(str.strip, columns[0])):
            return None
        weights = None
        if width == 3:
            try:
                weights = [_weight(field) for field in fields[2::width]]
            except ValueError:
                return None
        self.seen += len(columns[0])
        return Entries(columns, weights)

    def read_lines(self, first: int, block: bytes) -> Entries:
        """A block line by line."""
        columns: list[list[str]] = [[] for _ in self._source.languages]
        weights: list[float] = []
        lines = block.split(b"\n")
        for number, raw in enumerate(lines if lines[-1] else lines[:-1], start=first):
            try:
                entry = self._read_line(number, raw)
            except ValueError as error:
                why = f"not valid UTF-8 ({error})" if isinstance(error, UnicodeDecodeError) else str(error)
                # A line that does not decode still shows that the file is not empty.
                self.seen += isinstance(error, UnicodeDecodeError)
                message = f"{self._source.path}:{number}: {why}"
                if self._on_error == "stop":
                    raise UserError(
                        f"{message}; mend the line, or leave such lines out with --on-error skip"
                    ) from error
                self._errors.add(message)
                continue
            if entry is not None:
                for column, word in zip(columns, entry[0], strict=True):
                    column.append(word)
                weights.append(entry[1])
        return Entries(columns, weights)

    def _read_line(self, number: int, raw: bytes) -> tuple[list[str], float] | None:
        # utf-8-sig on the first line only: elsewhere U+FEFF is dirt inside a word, which cleaning removes.
        line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        if not line.strip():
            return None
        self.seen += 1
        weights, languages = self._source.weights, self._source.languages
        if self._format == "auto":
            self._format = detect_format(line, weights)
        words, weight = PARSERS[self._format](line, weights)
        if len(words) != len(languages):
            raise ValueError(f"got {len(words)} words, expected {len(languages)} ({'-'.join(languages)})")
        return words, weight


def _decode_block(number: int, block: bytes) -> str | None:
    """The text of a block, its lines ending in a line break alone; None where lines have to be looked at one by one."""
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
