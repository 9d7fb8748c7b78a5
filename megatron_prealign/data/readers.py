"""Streams documents out of text files and says exactly where a bad one lies.

Formats, by the ending of the file name; each may be gzipped (`.gz` behind it):

- `.jsonl`: one JSON object a line, its text under a key (`text` unless told otherwise). Blank lines are passed over.
- `.txt`: UTF-8 text, documents separated by one or more blank lines.

Files are read in blocks of whole documents, so that blocks can be parsed in any process and in any order.
"""

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import orjson

from megatron_prealign.data.problems import OnError as OnError
from megatron_prealign.data.problems import Problem as Problem
from megatron_prealign.data.problems import Problems as Problems
from megatron_prealign.data.problems import ReadError as ReadError
from megatron_prealign.errors import UserError

BLOCK_BYTES = 1 << 20
ENDINGS = (".jsonl", ".txt", ".jsonl.gz", ".txt.gz")
_UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Block:
    """A piece of a file that holds whole documents."""

    path: str
    """The file, as the user wrote it."""
    first_line: int
    """Number of the block's first line, counted from 1."""
    data: bytes
    """Uncompressed bytes, whole lines."""
    disk_bytes: int
    """Bytes of the file on disk that were read for this block, for progress."""


def check_inputs(paths: Sequence[str | Path]) -> int:
    """Checks that every path is a readable file of a known format, before any work starts.

    A missing file is most often a typing error that would quietly shrink the corpus, so it always stops.

    Args:
        paths: the input files.

    Returns:
        Their total size on disk in bytes.

    Raises:
        UserError: no path, a missing or unreadable file, a folder, an unknown ending or the same file twice.
    """
    if not paths:
        raise UserError(f"no input file given; expected at least one {', '.join(ENDINGS)} file")
    seen: dict[str, str | Path] = {}
    total = 0
    for path in paths:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such file; check the path")
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder; name the files in it, for example {path}/*.jsonl")
        if not str(path).endswith(ENDINGS):
            raise UserError(f"{path}: unknown kind of file; expected one of {', '.join(ENDINGS)}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: may not be read; check its permissions")
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"{path}: given twice (also as {seen[real]}); its documents would count double")
        seen[real] = path
        total += os.path.getsize(path)
    return total


def read_blocks(path: str | Path, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """Reads a file in blocks of about `block_bytes` that end between two documents.

    Raises:
        ReadError: the file is empty, or its gzip data is damaged or cut off. All blocks before the damage come first.
        UserError: the file is missing, unreadable or of an unknown kind.
    """
    name = str(path)
    if not name.endswith(ENDINGS):
        raise UserError(f"{name}: unknown kind of file; expected one of {', '.join(ENDINGS)}")
    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed below, apart from the errors of reading
    except OSError as error:
        raise UserError(f"{name}: cannot be opened ({error.strerror}); check the path and its permissions") from error
    with raw:
        stream: BinaryIO = gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw  # type: ignore[assignment]
        yield from _split(name, stream, raw, block_bytes)


def _split(name: str, stream: BinaryIO, raw: BinaryIO, block_bytes: int) -> Iterator[Block]:
    """Cuts `stream` at document ends; `raw` is the file on disk under it."""
    ends_document = _ends_at_any_line if ".jsonl" in name[-len(".jsonl.gz") :] else _ends_at_blank_line
    lines: list[bytes] = []
    size, line_number, first_line, disk_position = 0, 0, 1, 0
    damage: ReadError | None = None
    while True:
        try:
            line = stream.readline()
        except (EOFError, zlib.error, OSError) as error:
            damage = ReadError(f"{name}:{line_number + 1}", _read_failure(error))
            break
        if not line:
            break
        line_number += 1
        if line_number == 1 and line.startswith(_UTF8_BOM):
            line = line[len(_UTF8_BOM) :]
        lines.append(line)
        size += len(line)
        if size >= block_bytes and ends_document(line):
            position = raw.tell()
            yield Block(name, first_line, b"".join(lines), position - disk_position)
            disk_position, first_line = position, line_number + 1
            lines, size = [], 0
    if damage is None and line_number == 0:
        damage = ReadError(name, "empty file; expected at least one document")
    # At the end of the file the remaining bytes on disk (a gzip footer, too) belong to the last block.
    if lines or line_number:
        yield Block(name, first_line, b"".join(lines), os.fstat(raw.fileno()).st_size - disk_position)
    if damage is not None:
        raise damage


def _read_failure(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the gzip data ends too early (a cut-off download or copy?); fetch the file again"
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return f"damaged gzip data ({error}); fetch the file again"
    return f"cannot be read ({error}); check the disk"


def _ends_at_any_line(line: bytes) -> bool:
    return True


def _ends_at_blank_line(line: bytes) -> bool:
    return not line.strip()


def parse_block(
    block: Block, text_key: str = "text", on_error: OnError = "stop", problems: Problems | None = None
) -> Iterator[tuple[str, str]]:
    """Yields the documents of a block in order.

    Args:
        block: what `read_blocks` gave.
        text_key: the key of the text in each JSON object.
        on_error: `stop` raises at the first bad document, `skip` adds it to `problems` and goes on.
        problems: receives what was passed over.

    Yields:
        (text, `file:line`); the line is the document's first.

    Raises:
        ReadError: a bad document with `on_error="stop"`.
    """
    for line_number, raw in _json_lines(block) if ".jsonl" in block.path[-len(".jsonl.gz") :] else _paragraphs(block):
        where = f"{block.path}:{line_number}"
        try:
            if ".jsonl" in block.path[-len(".jsonl.gz") :]:
                yield _json_text(raw, text_key, where), where
            else:
                yield _decode(raw, where), where
        except ReadError as error:
            if on_error == "stop":
                raise
            if problems is not None:
                problems.add(error.where, error.why)


def _json_lines(block: Block) -> Iterator[tuple[int, bytes]]:
    # Only \n ends a line of JSON; bytes.splitlines() would also cut at a lone \r.
    for offset, line in enumerate(block.data.split(b"\n")):
        if line and not line.isspace():
            yield block.first_line + offset, line


def _paragraphs(block: Block) -> Iterator[tuple[int, bytes]]:
    lines: list[bytes] = []
    first = 0
    for offset, line in enumerate(block.data.split(b"\n")):
        if line.strip():
            first = first if lines else block.first_line + offset
            lines.append(line.rstrip(b"\r"))
        elif lines:
            yield first, b"\n".join(lines)
            lines = []
    if lines:
        yield first, b"\n".join(lines)


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReadError(
            where, f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}; convert the file to UTF-8"
        ) from error


def _json_text(raw: bytes, text_key: str, where: str) -> str:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # The parser calls broken UTF-8 broken JSON; the byte that is at fault helps more.
        text = _decode(raw, where)
        shown = text.strip()[:40]
        raise ReadError(
            where, f"not JSON ({error.msg} at column {error.colno}): {shown!r}; expected an object"
        ) from error
    if not isinstance(value, dict):
        raise ReadError(where, f'a JSON {_json_kind(value)}; expected an object like {{"{text_key}": "..."}}')
    if text_key not in value:
        keys = ", ".join(list(value)[:8]) or "none"
        raise ReadError(where, f"no key {text_key!r}; the keys are: {keys}; name the right one with --text-key")
    text = value[text_key]
    if not isinstance(text, str):
        raise ReadError(where, f"the value of {text_key!r} is a JSON {_json_kind(text)}; expected a string")
    return text


def _json_kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


def read_documents(
    paths: Sequence[str | Path],
    text_key: str = "text",
    on_error: OnError = "stop",
    problems: Problems | None = None,
) -> Iterator[tuple[str, str]]:
    """Streams all documents of all files, in order.

    Args:
        paths: the input files.
        text_key: the key of the text in each JSON object.
        on_error: `stop` raises at the first bad document or file; `skip` adds it to `problems` and goes on.
        problems: receives what was passed over.

    Yields:
        (text, `file:line`). The text may be empty.

    Raises:
        ReadError: something bad with `on_error="stop"`.
        UserError: a missing file or an unknown kind of file, whatever `on_error` says.
    """
    for path in paths:
        try:
            for block in read_blocks(path):
                yield from parse_block(block, text_key, on_error, problems)
        except ReadError as error:
            if on_error == "stop":
                raise
            if problems is not None:
                problems.add(error.where, error.why)
