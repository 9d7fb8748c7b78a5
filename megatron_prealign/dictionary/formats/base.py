"""Shared by all formats: inputs, entries, read errors, and reading files in blocks of complete lines."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.corpus.streams import read_chunks
from megatron_prealign.errors import UserError

FileFormat = Literal[
    "auto",
    "pairs",
    "words",
    "tsv",
    "csv",
    "space",
    "dictd",
    "stardict",
    "cedict",
    "wiktextract",
    "wiktextract-glosses",
    "panlex",
    "pyglossary",
]
OnError = Literal["stop", "skip"]

MAX_LISTED_ERRORS = 100
# Within the range of a 32-bit float, with headroom for sums of many weights.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-30, 1e30
BLOCK_BYTES = 1 << 22
_START_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 26
# Entries per block yielded by readers that parse complete articles.
BLOCK_ENTRIES = 1 << 16

_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

NO_TRANSLATION = "entries without a readable translation"


@dataclass(frozen=True, kw_only=True)
class DictionaryInput:
    """One word list.

    Attributes:
        path: file, plain or compressed; any one file of a multi-file dictionary; for PanLex also the directory.
        languages: language code of every column, headwords first.
        format: `auto` detects the format from name and content; other values force one.
        licence: licence of the list, stored in the table if the file does not state one; "" if unknown.
        weights: whether lists in columns have an extra last column with the weight of the pair.
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
        columns: one list of raw words per language, all of the same length.
        weights: weight of each entry; None if all are 1.
        languages: languages of the columns, if they differ from those of the input.
    """

    columns: list[list[str]]
    weights: list[float] | None
    languages: tuple[str, ...] | None = None


@dataclass
class ReadErrors:
    """Lines that could not be read: their number and the first messages."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < MAX_LISTED_ERRORS:
            self.first.append(message)


@dataclass
class FileInfo:
    """Metadata collected while reading a file."""

    format: str = ""
    title: str = ""
    licence: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    """Rule -> number of items that the reader skipped."""


@dataclass
class Reading:
    """State of reading one file."""

    source: DictionaryInput
    errors: ReadErrors
    on_error: OnError
    info: FileInfo

    def bad_entry(self, location: int | str, reason: str, cause: Exception | None = None) -> None:
        """Counts a bad line or entry, or raises.

        Args:
            location: line number, or a name of the entry.

        Raises:
            UserError: `on_error` is `stop`.
        """
        message = f"{self.source.path}:{location}: {reason}"
        if self.on_error == "stop":
            raise UserError(f"{message}; fix the line, or use --on-error skip to skip such lines") from cause
        self.errors.add(message)

    def check_two_languages(self) -> None:
        """Checks that the input has two languages, as the format requires.

        Raises:
            UserError: the input has more than two languages.
        """
        languages = self.source.languages
        if len(languages) != 2:
            raise UserError(
                f"{self.source.path}: got languages {'-'.join(languages)}, expected two for format {self.info.format}, "
                f"headwords first, such as {languages[0]}-{languages[1]}"
            )


def compression_of(path: Path) -> str:
    """Returns `""`, `"gz"`, `"zst"` or `"bz2"`, detected from the content: files are often renamed without being
    recompressed.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise UserError(f"cannot open {path}: {error.strerror}; check the path and its permissions") from error
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")


def read_start(path: Path) -> bytes:
    """Returns the first decompressed bytes of a file, or b"" if they cannot be decompressed.

    Raises:
        UserError: the file cannot be opened.
    """
    chunks = read_chunks(str(path), compression_of(path), _START_BYTES)
    try:
        return next(chunks, (b"", 0))[0]
    except ReadError:
        # The reader of the file reports the location of the error.
        return b""


def read_file(path: Path, limit: int) -> bytes:
    """Returns the decompressed content; stops after the chunk that exceeds `limit` bytes.

    Raises:
        UserError: the file cannot be opened, or its compressed data is corrupt or truncated.
    """
    parts, size = [], 0
    for data, _ in read_chunks(str(path), compression_of(path)):
        parts.append(data)
        size += len(data)
        if size > limit:
            break
    return b"".join(parts)


def read_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields blocks of complete lines with the number of their first line, counted from 1.

    Raises:
        UserError: the file cannot be opened, is UTF-16, has a line of more than 64 MiB, or its compressed data is
            corrupt (the message names the last readable line).
    """
    number, pending = 1, b""
    chunks = read_chunks(str(path), compression_of(path), BLOCK_BYTES)
    while True:
        try:
            data = next(chunks, (b"", 0))[0]
        except ReadError as error:
            last = number + pending.count(b"\n")
            raise UserError(f"{path}:{last}: {error.why}") from error
        if number == 1 and not pending and data.startswith(_UTF16):
            raise UserError(f"{path}:1: got UTF-16, expected UTF-8; convert the file, for example with iconv")
        pending += data
        if data and len(pending) < BLOCK_BYTES:
            continue
        end = pending.rfind(b"\n") + 1 if data else len(pending)
        block, pending = pending[:end], pending[end:]
        if block:
            yield number, block
            number += block.count(b"\n")
        if not data:
            return
        if len(pending) > MAX_LINE_BYTES:
            raise UserError(
                f"{path}:{number}: got a line of more than {MAX_LINE_BYTES >> 20} MiB, expected one entry per line; "
                "check that the file is a text of such lines"
            )


def read_lines(reading: Reading) -> Iterator[tuple[int, str]]:
    """Yields numbered UTF-8 lines without line endings; lines that do not decode are bad entries.

    Raises:
        UserError: see `read_blocks`; the file is empty.
    """
    has_text = False
    for first, block in read_blocks(reading.source.path):
        for number, raw in enumerate(block.split(b"\n"), start=first):
            try:
                line = decode_line(number, raw)
            except UnicodeDecodeError as error:
                reading.bad_entry(number, f"not valid UTF-8 ({error})", error)
                continue
            has_text = has_text or bool(line.strip())
            yield number, line
    if not has_text:
        raise empty_file_error(reading.source.path)


def decode_line(number: int, raw: bytes) -> str:
    """Decodes a line and strips its ending; utf-8-sig only for line 1, since U+FEFF elsewhere is left to cleaning."""
    return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def empty_file_error(path: Path) -> UserError:
    return UserError(f"{path}: the file is empty, expected one entry per line")


class PairBuffer:
    """Buffers pairs and yields them in blocks."""

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._targets: list[str] = []

    def add(self, source: str, targets: list[str]) -> None:
        """Adds a headword with its translations."""
        self._sources += [source] * len(targets)
        self._targets += targets

    def flush_if_full(self) -> Iterator[Entries]:
        """Yields the buffered pairs once there are enough of them."""
        if len(self._sources) >= BLOCK_ENTRIES:
            yield from self.flush()

    def flush(self) -> Iterator[Entries]:
        """Yields the buffered pairs, if any."""
        if self._sources:
            yield Entries([self._sources, self._targets], None)
            self._sources, self._targets = [], []
