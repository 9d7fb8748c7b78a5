"""Parses documents from blocks and reports the exact line of every problem.

A document is a JSON object on one line or a table row, with its text under a key that may be nested (`data.text`).
Blank lines are skipped. In `.txt` files blank lines separate the documents.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_prealign import languages
from megatron_prealign.corpus.blocks import Block, Extent, Limits, Span, read_blocks, read_span, too_long_message
from megatron_prealign.corpus.inputs import Input
from megatron_prealign.corpus.read_errors import MAX_LISTED
from megatron_prealign.corpus.read_errors import OnError as OnError
from megatron_prealign.corpus.read_errors import Problem as Problem
from megatron_prealign.corpus.read_errors import Problems as Problems
from megatron_prealign.corpus.read_errors import ReadError as ReadError
from megatron_prealign.languages import is_language_code

EMPTY = "empty document"
_SHOWN_KEYS = 8


@dataclass(frozen=True)
class Fields:
    """Keys under which a document stores its texts and its language."""

    text_keys: tuple[str, ...] = ("text",)
    """Keys of the text; a dot selects a nested key (`data.text`), unless a key with that dot exists."""
    joined_by: str | None = None
    """Separator that joins all keys into one text; None keeps a separate text per key."""
    language_key: str | None = None
    """Key of the language code; None if documents have none."""

    @property
    def only_key(self) -> str | None:
        """The key if only one is read, else None."""
        return self.text_keys[0] if len(self.columns) == 1 and self.joined_by is None else None

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """Keys of each text of a document: one group if they are joined, else one group per key."""
        return (self.text_keys,) if self.joined_by is not None else tuple((key,) for key in self.text_keys)

    @property
    def columns(self) -> tuple[str, ...]:
        """All keys to read."""
        return self.text_keys if self.language_key is None else (*self.text_keys, self.language_key)


@dataclass
class Documents:
    """Documents of a block, in order."""

    texts: list[list[str]]
    """Texts of all documents, per key (one if joined). A text is empty only if another key of the document has text."""
    numbers: list[int] = field(default_factory=list)
    """Line or row of the block at which each document starts, from 0."""
    languages: list[str] = field(default_factory=list)
    """Language code of each document; empty without a language key."""
    lines: int = 0
    """Number of lines or rows in the block."""
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    """Skipped documents: line or row in the block, byte offset in the file (-1 if unknown), and reason."""
    unlisted: int = 0
    """Number of further skipped documents: bounds the memory for a block that contains only bad lines."""
    _stops: bool = False

    def skip(self, number: int, byte: int, why: str) -> None:
        """Lists a problem, or counts it if the list is full; the first problem that can stop a run is always listed."""
        if len(self.problems) < MAX_LISTED or (why != EMPTY and not self._stops):
            self.problems.append((number, byte, why))
        else:
            self.unlisted += 1
        self._stops = self._stops or why != EMPTY


class _BadDocument(Exception):
    """Raised with the reason why a document is invalid."""


def parse_block(block: Block, fields: Fields, limits: Limits) -> Documents:
    """Parses the documents of a block; problems are listed, not raised.

    Raises:
        ReadError: the file of a span cannot be read.
    """
    documents = Documents([[] for _ in fields.texts])
    if block.problem is not None:
        documents.lines = block.lines
        documents.skip(0, -1, block.problem)
    elif block.kind == "rows":
        assert isinstance(block.content, bytes), "rows are read in the parent"
        _parse_rows(block.content, fields, limits, documents)
    else:
        _parse_text(block, fields, limits, documents)
    return documents


def _parse_text(block: Block, fields: Fields, limits: Limits, documents: Documents) -> None:
    begin, is_cut = None, False
    if isinstance(block.content, Span):
        data, begin, is_cut = read_span(block.content, limits)
    else:
        data = block.content
    lines = data.split(b"\n")
    # Text after the last line break counts as a line only if it is not empty.
    documents.lines = len(lines) - (not lines[-1])
    raw_documents = _paragraphs(lines) if block.kind == "paragraphs" else enumerate(lines)
    extractor = _TextExtractor(fields, documents)
    # Fast path for a single JSON key, which is nearly every corpus.
    only = fields.only_key if block.kind == "lines" else None
    texts, numbers, longest = documents.texts[0], documents.numbers, limits.document_bytes
    counted, byte = 0, -1 if begin is None else begin
    for number, raw in raw_documents:
        if raw and not raw.isspace():
            if only is not None and len(raw) <= longest:
                text = _text_under(only, raw)
                if text is not None:
                    texts.append(text)
                    numbers.append(number)
                    continue
            try:
                if len(raw) > limits.document_bytes:
                    raise _BadDocument(too_long_message(limits))
                extractor.add(number, {"text": _decode(raw)} if block.kind == "paragraphs" else _json_object(raw))
            except _BadDocument as error:
                if begin is not None:
                    # Continue from the last bad line, so that all of them together cost one pass over the block.
                    byte += sum(len(line) + 1 for line in lines[counted:number])
                    counted = number
                documents.skip(number, byte, str(error))
    if is_cut:
        documents.skip(documents.lines, (begin or 0) + len(data), too_long_message(limits))
        documents.lines += 1


def _text_under(key: str, raw: bytes) -> str | None:
    """Fast path: returns the text of a valid JSON object; None for anything that needs the full checks."""
    try:
        text = orjson.loads(raw)[key]
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
        return None
    return text if type(text) is str and text and not text.isspace() else None


def _parse_rows(payload: bytes, fields: Fields, limits: Limits, documents: Documents) -> None:
    from megatron_prealign.corpus.parquet import rows_of

    columns = rows_of(payload)
    extractor = _TextExtractor(fields, documents)
    values = [columns[key] for key in fields.columns]
    documents.lines = len(values[0])
    for number, row in enumerate(zip(*values, strict=True)):
        try:
            if sum(map(_utf8_bytes, row)) > limits.document_bytes:
                raise _BadDocument(too_long_message(limits))
            extractor.add(number, dict(zip(fields.columns, row, strict=True)))
        except _BadDocument as error:
            documents.skip(number, -1, str(error))


def _utf8_bytes(value: object) -> int:
    if not isinstance(value, str):
        return 0
    return len(value) if value.isascii() else len(value.encode())


class _TextExtractor:
    """Extracts the texts of one document at a time."""

    def __init__(self, fields: Fields, documents: Documents) -> None:
        self._fields, self._documents = fields, documents
        self._get = [_getter(key) for key in fields.text_keys]
        self._language = None if fields.language_key is None else _getter(fields.language_key)

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Adds a document.

        Raises:
            _BadDocument: the document is empty, a key is missing or its value has the wrong type.
        """
        fields, documents = self._fields, self._documents
        texts: list[str] = []
        for key, get in zip(fields.text_keys, self._get, strict=True):
            text = get(record)
            if type(text) is not str:
                raise _BadDocument(_no_text(key, text))
            texts.append("" if text.isspace() else text)
        language = None
        if self._language is not None:
            language = self._language(record)
            if not isinstance(language, str) or not is_language_code(language.strip()):
                raise _BadDocument(
                    f"value of {fields.language_key!r} is {repr(language)[:80]}, expected {languages.EXPECTED}"
                )
        if fields.joined_by is not None:
            texts = [fields.joined_by.join(text for text in texts if text)]
        if not any(texts):
            raise _BadDocument(EMPTY)
        for column, text in zip(documents.texts, texts, strict=True):
            column.append(text)
        documents.numbers.append(number)
        if language is not None:
            documents.languages.append(language.strip())


def _getter(key: str) -> Callable[[dict[str, Any]], Any]:
    def get(record: dict[str, Any]) -> Any:
        if key in record:
            return record[key]
        value: Any = record
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise _BadDocument(_no_key(key, value if isinstance(value, dict) else record))
            value = value[part]
        return value

    return get


def _no_key(key: str, record: dict[str, Any]) -> str:
    keys = ", ".join(list(record)[:_SHOWN_KEYS]) or "none"
    return f"no key {key!r}; keys: {keys}; select one with --text-key or --language-key"


def _no_text(key: str, value: object) -> str:
    if isinstance(value, bytes):
        return f"value of {key!r} is not UTF-8; convert the text to UTF-8"
    return f"value of {key!r} is a JSON {_json_kind(value)}, expected a string"


def _paragraphs(lines: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    paragraph: list[bytes] = []
    first = 0
    for number, line in enumerate(lines):
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line.rstrip(b"\r"))
        elif paragraph:
            yield first, b"\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield first, b"\n".join(paragraph)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _BadDocument(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1}; convert the file to UTF-8"
        ) from error


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        # The parser reports invalid UTF-8 as invalid JSON; the offending byte is more helpful.
        text = _decode(raw)
        if "NaN" in text or "Infinity" in text:
            return _python_json(text)
        shown = text.strip()[:40]
        raise _BadDocument(
            f"invalid JSON ({error.msg} at column {error.colno}): {shown!r}, expected an object"
        ) from error
    if not isinstance(value, dict):
        raise _BadDocument(f'got a JSON {_json_kind(value)}, expected an object like {{"text": "..."}}')
    return value


def _python_json(text: str) -> dict[str, Any]:
    """Parses an object with the non-standard NaN and Infinity of Python and pandas; rejects lone surrogates."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise _BadDocument(f"invalid JSON ({error}): {text.strip()[:40]!r}, expected an object") from error
    if not isinstance(value, dict):
        raise _BadDocument(f'got a JSON {_json_kind(value)}, expected an object like {{"text": "..."}}')
    return value


def _json_kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


class LocationTracker:
    """Tracks line numbers while the blocks of an input are processed in order."""

    def __init__(self, name: str, unit: str = "", first: int | None = 0) -> None:
        """Starts after `first` lines of the input `name` (None if unknown). `unit` precedes a number, as in `row 3`."""
        self.name, self.unit, self.lines = name, unit, first

    def location(self, number: int, byte: int) -> str:
        """Location of a line of the current block."""
        if self.lines is None:
            return f"{self.name}:byte {byte:,}" if byte >= 0 else self.name
        return f"{self.name}:{self.unit}{self.lines + number + 1}"

    def advance(self, lines: int) -> None:
        """Advances past a block of `lines` lines."""
        if self.lines is not None:
            self.lines += lines


def location_unit(source: Input) -> str:
    """Returns the text that precedes a number in a location in this input."""
    return "row " if source.kind in ("parquet", "hub") else ""


def read_documents(
    inputs: Sequence[Input],
    text_keys: Sequence[str] = ("text",),
    on_error: OnError = "stop",
    problems: Problems | None = None,
    limits: Limits | None = None,
) -> Iterator[tuple[str, str]]:
    """Streams all documents of all inputs, in order. Several keys are joined by a line break; empty documents are
    skipped.

    Args:
        inputs: result of `inputs.resolve_inputs`.
        text_keys: keys of the text in each JSON object or row.
        on_error: `stop` raises at the first bad document or file; `skip` adds it to `problems` and continues.
        problems: collects skipped documents and files.
        limits: limits on document length.

    Yields:
        (text, `file:line`).

    Raises:
        ReadError: a bad document or file with `on_error="stop"`.
        UserError: a file cannot be opened, regardless of `on_error`.
    """
    fields = Fields(tuple(text_keys), joined_by=None if len(text_keys) == 1 else "\n")
    limits = Limits() if limits is None else limits
    for source in inputs:
        tracker = LocationTracker(source.name, location_unit(source))
        for block in read_blocks(source, fields.columns, limits, Extent()):
            documents = parse_block(block, fields, limits)
            # In file order, so that all documents before a bad one are yielded before the error.
            remaining = iter([*documents.problems, None])
            problem = next(remaining)
            for number, text in zip(documents.numbers, documents.texts[0], strict=True):
                while problem is not None and problem[0] < number:
                    _report(tracker, problem, block, on_error, problems)
                    problem = next(remaining)
                yield text, tracker.location(number, -1)
            while problem is not None:
                _report(tracker, problem, block, on_error, problems)
                problem = next(remaining)
            if problems is not None:
                problems.count += documents.unlisted
            tracker.advance(documents.lines)


def _report(
    tracker: LocationTracker, problem: tuple[int, int, str], block: Block, on_error: OnError, problems: Problems | None
) -> None:
    number, byte, why = problem
    where = block.location or tracker.location(number, byte)
    if on_error == "stop" and why != EMPTY:
        raise ReadError(where, why)
    if problems is not None:
        problems.add(where, why)
