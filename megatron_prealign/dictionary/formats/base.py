"""What all formats share: an input and its entries, what is left out, and files in blocks of whole lines."""

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
# What a 32-bit float holds with room to add many.
SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-30, 1e30
BLOCK_BYTES = 1 << 22
MAX_LINE_BYTES = 1 << 26
# Entries that readers of whole articles hand over at a time.
ENTRIES_AT_ONCE = 1 << 16

_MAGIC = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2"}
_UTF16 = (b"\xff\xfe", b"\xfe\xff")

NO_TRANSLATION = "entries without a translation that can be read"


@dataclass(frozen=True, kw_only=True)
class DictionaryInput:
    """One word list.

    Attributes:
        path: the file, plain or compressed, or one of several that belong together; for PanLex the directory.
        languages: language code of every column; the first is that of the headwords.
        format: `auto` looks at the name and the content; the others force one format.
        licence: name of the list's licence, kept in the table where the file does not tell its own ("" if not told).
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
        languages: of the columns, where they are not those of the input.
    """

    columns: list[list[str]]
    weights: list[float] | None
    languages: tuple[str, ...] | None = None


@dataclass
class ReadErrors:
    """Lines that could not be read; only the first ones are listed."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < MAX_LISTED_ERRORS:
            self.first.append(message)


@dataclass
class FileInfo:
    """What reading a file showed beside its entries."""

    format: str = ""
    title: str = ""
    licence: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    """Rule -> how often the reader itself passed something over."""


@dataclass
class Reading:
    """One file being read."""

    source: DictionaryInput
    errors: ReadErrors
    on_error: OnError
    facts: FileInfo

    def bad(self, place: int | str, why: str, cause: Exception | None = None) -> None:
        """Counts a bad line or entry, or stops at it.

        Args:
            place: number of the line, or what names the entry.

        Raises:
            UserError: bad lines are not to be skipped.
        """
        message = f"{self.source.path}:{place}: {why}"
        if self.on_error == "stop":
            raise UserError(f"{message}; mend the line, or leave such lines out with --on-error skip") from cause
        self.errors.add(message)

    def two_languages(self) -> None:
        """Checks that the input is of two languages, as a format has it.

        Raises:
            UserError: it is of more.
        """
        languages = self.source.languages
        if len(languages) != 2:
            raise UserError(
                f"{self.source.path}: languages {'-'.join(languages)}, expected two for this format "
                f"({self.facts.format}), headwords first, such as {languages[0]}-{languages[1]}"
            )


def compression_of(path: Path) -> str:
    """`""`, `"gz"`, `"zst"` or `"bz2"`, by the content: files are often renamed without being recompressed.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be opened ({error.strerror}); check the path of this dictionary file and its permissions"
        ) from error
    return next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), "")


def read_start(path: Path, size: int = 1 << 16) -> bytes:
    """The first bytes of a file, decompressed, as far as they can be read.

    Raises:
        UserError: the file cannot be opened.
    """
    chunks = read_chunks(str(path), compression_of(path), size)
    try:
        return next(chunks, (b"", 0))[0]
    except ReadError:
        # Whoever reads on says where the damage is.
        return b""


def read_whole(path: Path, limit: int) -> bytes:
    """The decompressed content up to `limit` bytes and a piece.

    Raises:
        UserError: the file cannot be opened, or its compressed data is damaged or cut off.
    """
    parts, size = [], 0
    for data, _ in read_chunks(str(path), compression_of(path)):
        parts.append(data)
        size += len(data)
        if size > limit:
            break
    return b"".join(parts)


def read_blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines, many at a time, with the number of the first, from 1.

    Raises:
        UserError: the file cannot be opened, is UTF-16 or has an endless line, or its compressed data is damaged (the
            message names the last line before that).
    """
    number, begun = 1, b""
    chunks = read_chunks(str(path), compression_of(path), BLOCK_BYTES)
    while True:
        try:
            data = next(chunks, (b"", 0))[0]
        except ReadError as error:
            last = number + begun.count(b"\n")
            raise UserError(f"{path}:{last}: {error.why}") from error
        if number == 1 and not begun and data.startswith(_UTF16):
            raise UserError(f"{path}:1: the text is UTF-16, expected UTF-8; convert it, for example with iconv")
        begun += data
        if data and len(begun) < BLOCK_BYTES:
            continue
        end = begun.rfind(b"\n") + 1 if data else len(begun)
        block, begun = begun[:end], begun[end:]
        if block:
            yield number, block
            number += block.count(b"\n")
        if not data:
            return
        if len(begun) > MAX_LINE_BYTES:
            raise UserError(
                f"{path}:{number}: a line of more than {MAX_LINE_BYTES >> 20} MiB, expected one entry a line; check "
                "that this is a word list"
            )


def read_lines(reading: Reading) -> Iterator[tuple[int, str]]:
    """Lines of UTF-8 with their numbers, without their ends; those that are something else are bad lines.

    Raises:
        UserError: see `read_blocks`; the file is empty.
    """
    seen = False
    for first, block in read_blocks(reading.source.path):
        for number, raw in enumerate(block.split(b"\n"), start=first):
            try:
                line = decode_line(number, raw)
            except UnicodeDecodeError as error:
                reading.bad(number, f"not valid UTF-8 ({error})", error)
                continue
            seen = seen or bool(line.strip())
            yield number, line
    if not seen:
        raise empty(reading.source.path)


def decode_line(number: int, raw: bytes) -> str:
    """A line without its end; utf-8-sig on the first alone: elsewhere U+FEFF is dirt inside a word, for cleaning."""
    return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")


def empty(path: Path) -> UserError:
    return UserError(f"{path}: the file is empty, expected one entry a line")


class Collector:
    """Gathers pairs and hands them over many at a time."""

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._targets: list[str] = []

    def add(self, source: str, targets: list[str]) -> None:
        """Adds a headword with its translations."""
        self._sources += [source] * len(targets)
        self._targets += targets

    def full(self) -> Iterator[Entries]:
        """What has been gathered, if it is enough."""
        if len(self._sources) >= ENTRIES_AT_ONCE:
            yield from self.rest()

    def rest(self) -> Iterator[Entries]:
        """What has been gathered."""
        if self._sources:
            yield Entries([self._sources, self._targets], None)
            self._sources, self._targets = [], []
