"""Reads word lists: which words stand for each other in which languages, and where a file is broken.

Formats: JSON lines `{"src_text": "apple", "tgt_text": "苹果"}`, JSON lines `{"words": "bank $ 银行 $ banque"}`, two
columns separated by a tab, two words separated by a space (MUSE). Any of them may be gzip-compressed.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, cast

from megatron_prealign.errors import UserError

FileFormat = Literal["auto", "pairs", "words", "tsv", "space"]
OnError = Literal["stop", "skip"]

MAX_LISTED_ERRORS = 100
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
    """

    path: Path
    languages: tuple[str, ...]
    format: FileFormat = "auto"
    licence: str = ""


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
    text: str, default_languages: str | None = None, format: FileFormat = "auto", licence: str = ""
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
            raise UserError(
                f"--input {text}: no languages given, expected FILE:SOURCE-TARGET such as {text}:en-de, "
                "or --languages en-de for all files"
            )
        languages = parse_languages(default_languages, "--languages")
    return DictionaryInput(path=Path(path), languages=languages, format=format, licence=licence)


def _open(path: Path) -> BinaryIO:
    try:
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot read this dictionary file: {error.strerror}") from error
    is_gzip = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    # What decides is the content: files are often renamed without being recompressed.
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if is_gzip else stream


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Line numbers from 1 with the line's bytes; the mistakes of a broken archive name the last line that was whole."""
    number = 0
    with _open(path) as stream:
        try:
            for number, line in enumerate(stream, start=1):
                yield number, line
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(
                f"{path}:{number}: the gzip archive is damaged or cut off behind this line ({error}); fetch it again"
            ) from error


def _parse_tsv(line: str) -> list[str]:
    columns = line.split("\t")
    if len(columns) != 2:
        raise ValueError(f"got {_columns(len(columns))}, expected 2 separated by one tab")
    return columns


def _parse_space(line: str) -> list[str]:
    columns = line.split()
    if len(columns) != 2:
        raise ValueError(
            f"got {_columns(len(columns))}, expected 2 words separated by a space (by a tab if a word contains spaces)"
        )
    return columns


def _columns(count: int) -> str:
    return "1 column" if count == 1 else f"{count} columns"


def _parse_json(line: str) -> dict[str, object]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}), expected one JSON object a line") from error
    if not isinstance(record, dict):
        raise ValueError(f"got a JSON {type(record).__name__}, expected an object")
    return record


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


def _parse_pairs(line: str) -> list[str]:
    record = _parse_json(line)
    return [_text_of(record, "src_text"), _text_of(record, "tgt_text")]


def _parse_words(line: str) -> list[str]:
    return _text_of(_parse_json(line), "words").split(WORDS_SEPARATOR)


PARSERS: dict[str, Callable[[str], list[str]]] = {
    "pairs": _parse_pairs,
    "words": _parse_words,
    "tsv": _parse_tsv,
    "space": _parse_space,
}


def detect_format(line: str) -> str:
    """Format of a file from its first line that is not blank."""
    if line.lstrip().startswith("{"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return "pairs"
        return "words" if isinstance(record, dict) and "words" in record else "pairs"
    return "tsv" if "\t" in line or len(line.split()) != 2 else "space"


def read_entries(source: DictionaryInput, errors: ReadErrors, on_error: OnError = "stop") -> Iterator[list[str]]:
    """Yields the words of every line, one per language of `source.languages`, as they stand in the file.

    Args:
        source: the file and its languages.
        errors: gets every line left out (only with `on_error="skip"`).
        on_error: `stop` raises at the first bad line, `skip` counts it and goes on.

    Raises:
        UserError: a file that cannot be opened or holds nothing, a damaged archive; with `stop` also a bad line
            (`file:line`, what it holds, what was expected).
    """
    format_name: str = source.format
    seen = 0
    for number, raw in _raw_lines(source.path):
        try:
            # utf-8-sig on the first line only: elsewhere U+FEFF is dirt inside a word, which cleaning removes.
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if not line.strip():
                continue
            seen += 1
            if format_name == "auto":
                format_name = detect_format(line)
            entry = PARSERS[format_name](line)
            if len(entry) != len(source.languages):
                raise ValueError(
                    f"got {len(entry)} words, expected {len(source.languages)} ({'-'.join(source.languages)})"
                )
        except ValueError as error:
            why = f"not valid UTF-8 ({error})" if isinstance(error, UnicodeDecodeError) else str(error)
            # A line that does not decode still shows that the file is not empty.
            seen += isinstance(error, UnicodeDecodeError)
            message = f"{source.path}:{number}: {why}"
            if on_error == "stop":
                raise UserError(f"{message}; mend the line, or leave such lines out with --on-error skip") from error
            errors.add(message)
            continue
        yield entry
    if not seen:
        raise UserError(f"{source.path}: the file is empty, expected one entry a line")
