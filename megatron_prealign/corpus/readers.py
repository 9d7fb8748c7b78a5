"""Finds the documents in blocks and says exactly which line is wrong.

JSON lines hold one object each, tables one row; the text stands under a key, which may be nested (`data.text`). Blank
lines are passed over. In `.txt` files blank lines separate the documents.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from megatron_prealign.corpus.blocks import Block, Extent, Limits, Span, read_blocks, read_span, too_long
from megatron_prealign.corpus.inputs import Input
from megatron_prealign.corpus.read_errors import MAX_LISTED
from megatron_prealign.corpus.read_errors import OnError as OnError
from megatron_prealign.corpus.read_errors import Problem as Problem
from megatron_prealign.corpus.read_errors import Problems as Problems
from megatron_prealign.corpus.read_errors import ReadError as ReadError

EMPTY = "empty document"
_SHOWN_KEYS = 8
_LANGUAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True)
class Fields:
    """Where the texts of a document stand."""

    text_keys: tuple[str, ...] = ("text",)
    """Keys of the text; a dot leads into an object (`data.text`), unless there is a key with that dot."""
    joined_by: str | None = None
    """Makes one text of all keys, with this between them; None keeps each key as a text of its own."""
    language_key: str | None = None
    """Key of the language code; None if it is not in the documents."""

    @property
    def only_key(self) -> str | None:
        """The key, if all that is read stands under one."""
        return self.text_keys[0] if len(self.columns) == 1 and self.joined_by is None else None

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The keys of each text of a document: all together if they are joined, else each by itself."""
        return (self.text_keys,) if self.joined_by is not None else tuple((key,) for key in self.text_keys)

    @property
    def columns(self) -> tuple[str, ...]:
        """All keys that are read."""
        return self.text_keys if self.language_key is None else (*self.text_keys, self.language_key)


@dataclass
class Documents:
    """The documents of a block, in order."""

    texts: list[list[str]]
    """For each key (one, if they are joined) the text of every document; none is empty unless another key has text."""
    numbers: list[int] = field(default_factory=list)
    """In which line or row of the block each begins, from 0."""
    languages: list[str] = field(default_factory=list)
    """The language code of each, as it stands there; empty without a language key."""
    lines: int = 0
    """Lines or rows in the block."""
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    """What was passed over: its line or row in the block, its byte in the file (-1 where nobody knows), and why."""
    unlisted: int = 0
    """What else was passed over: a block of nothing but bad lines must not fill the memory with reasons."""
    _stops: bool = False

    def skip(self, number: int, byte: int, why: str) -> None:
        """Lists a problem while there is room, else counts it; what may stop the run always finds room."""
        if len(self.problems) < MAX_LISTED or (why != EMPTY and not self._stops):
            self.problems.append((number, byte, why))
        else:
            self.unlisted += 1
        self._stops = self._stops or why != EMPTY


class _BadDocument(Exception):
    """Why a document cannot be used."""


def parse_block(block: Block, fields: Fields, limits: Limits) -> Documents:
    """The documents of a block; what is wrong in it is listed, not raised.

    Raises:
        ReadError: the file of a span cannot be read.
    """
    found = Documents([[] for _ in fields.texts])
    if block.problem is not None:
        found.lines = block.lines
        found.skip(0, -1, block.problem)
    elif block.kind == "rows":
        assert isinstance(block.content, bytes), "rows are read in the parent"
        _parse_rows(block.content, fields, limits, found)
    else:
        _parse_text(block, fields, limits, found)
    return found


def _parse_text(block: Block, fields: Fields, limits: Limits, found: Documents) -> None:
    begin, is_cut = None, False
    if isinstance(block.content, Span):
        data, begin, is_cut = read_span(block.content, limits)
    else:
        data = block.content
    lines = data.split(b"\n")
    # What is behind the last line break is a line of its own only if something is there.
    found.lines = len(lines) - (not lines[-1])
    documents = _paragraphs(lines) if block.kind == "paragraphs" else enumerate(lines)
    take = _Taker(fields, found)
    # One key of JSON, which is nearly every corpus, is read with as little around the parser as there can be.
    only = fields.only_key if block.kind == "lines" else None
    texts, numbers, longest = found.texts[0], found.numbers, limits.document_bytes
    counted, byte = 0, -1 if begin is None else begin
    for number, raw in documents:
        if raw and not raw.isspace():
            if only is not None and len(raw) <= longest:
                text = _text_under(only, raw)
                if text is not None:
                    texts.append(text)
                    numbers.append(number)
                    continue
            try:
                if len(raw) > limits.document_bytes:
                    raise _BadDocument(too_long(limits))
                take.add(number, {"text": _decode(raw)} if block.kind == "paragraphs" else _json_object(raw))
            except _BadDocument as error:
                if begin is not None:
                    # On from the last bad line: all of them together take as long as one look at the block.
                    byte += sum(len(line) + 1 for line in lines[counted:number])
                    counted = number
                found.skip(number, byte, str(error))
    if is_cut:
        found.skip(found.lines, (begin or 0) + len(data), too_long(limits))
        found.lines += 1


def _text_under(key: str, raw: bytes) -> str | None:
    """The text of a JSON object without anything odd; None for any other, which somebody must look at closely."""
    try:
        text = orjson.loads(raw)[key]
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
        return None
    return text if type(text) is str and text and not text.isspace() else None


def _parse_rows(payload: bytes, fields: Fields, limits: Limits, found: Documents) -> None:
    from megatron_prealign.corpus.parquet import rows_of

    columns = rows_of(payload)
    take = _Taker(fields, found)
    values = [columns[key] for key in fields.columns]
    found.lines = len(values[0])
    for number, row in enumerate(zip(*values, strict=True)):
        try:
            if sum(map(_utf8_bytes, row)) > limits.document_bytes:
                raise _BadDocument(too_long(limits))
            take.add(number, dict(zip(fields.columns, row, strict=True)))
        except _BadDocument as error:
            found.skip(number, -1, str(error))


def _utf8_bytes(value: object) -> int:
    if not isinstance(value, str):
        return 0
    return len(value) if value.isascii() else len(value.encode())


class _Taker:
    """Takes the texts out of one document after the other."""

    def __init__(self, fields: Fields, found: Documents) -> None:
        self._fields, self._found = fields, found
        self._get = [_getter(key) for key in fields.text_keys]
        self._language = None if fields.language_key is None else _getter(fields.language_key)

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Adds a document, or says that it is empty.

        Raises:
            _BadDocument: a key is missing or holds something else.
        """
        fields, found = self._fields, self._found
        texts: list[str] = []
        for key, get in zip(fields.text_keys, self._get, strict=True):
            text = get(record)
            if type(text) is not str:
                raise _BadDocument(_no_text(key, text))
            texts.append("" if text.isspace() else text)
        language = None
        if self._language is not None:
            language = self._language(record)
            if not isinstance(language, str) or not _LANGUAGE.fullmatch(language.strip()):
                raise _BadDocument(
                    f"the language under {fields.language_key!r} is {repr(language)[:80]}; expected a code of "
                    "letters, digits, '_', '.' and '-' such as de: it becomes part of a file name"
                )
        if fields.joined_by is not None:
            texts = [fields.joined_by.join(text for text in texts if text)]
        if not any(texts):
            raise _BadDocument(EMPTY)
        for column, text in zip(found.texts, texts, strict=True):
            column.append(text)
        found.numbers.append(number)
        if language is not None:
            found.languages.append(language.strip())


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
    return f"no key {key!r}; the keys are: {keys}; name the right one with --text-key or --language-key"


def _no_text(key: str, value: object) -> str:
    if isinstance(value, bytes):
        return f"the value of {key!r} is not UTF-8; convert the text to UTF-8"
    return f"the value of {key!r} is a JSON {_json_kind(value)}; expected a string"


def _paragraphs(lines: Sequence[bytes]) -> Iterator[tuple[int, bytes]]:
    begun: list[bytes] = []
    first = 0
    for number, line in enumerate(lines):
        if line.strip():
            first = first if begun else number
            begun.append(line.rstrip(b"\r"))
        elif begun:
            yield first, b"\n".join(begun)
            begun = []
    if begun:
        yield first, b"\n".join(begun)


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
        # The parser calls broken UTF-8 broken JSON; the byte that is at fault helps more.
        text = _decode(raw)
        if "NaN" in text or "Infinity" in text:
            return _python_json(text)
        shown = text.strip()[:40]
        raise _BadDocument(f"not JSON ({error.msg} at column {error.colno}): {shown!r}; expected an object") from error
    if not isinstance(value, dict):
        raise _BadDocument(f'a JSON {_json_kind(value)}; expected an object like {{"text": "..."}}')
    return value


def _python_json(text: str) -> dict[str, Any]:
    """An object with the NaN and Infinity that Python and pandas write, which JSON has not; no half surrogate pairs."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise _BadDocument(f"not JSON ({error}): {text.strip()[:40]!r}; expected an object") from error
    if not isinstance(value, dict):
        raise _BadDocument(f'a JSON {_json_kind(value)}; expected an object like {{"text": "..."}}')
    return value


def _json_kind(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


class Places:
    """Where the lines of an input lie, while its blocks are gone through in order."""

    def __init__(self, name: str, unit: str = "", first: int | None = 0) -> None:
        """Starts behind `first` lines of the input `name`; None where their number is not known. `unit` stands before a
        number, as in `row 3`."""
        self.name, self.unit, self.lines = name, unit, first

    def of(self, number: int, byte: int) -> str:
        """The place of a line of the block at hand."""
        if self.lines is None:
            return f"{self.name}:byte {byte:,}" if byte >= 0 else self.name
        return f"{self.name}:{self.unit}{self.lines + number + 1}"

    def skip(self, lines: int) -> None:
        """Goes on behind a block with so many lines."""
        if self.lines is not None:
            self.lines += lines


def unit_of(source: Input) -> str:
    """What stands before a number in a place within this input."""
    return "row " if source.kind in ("parquet", "hub") else ""


def read_documents(
    inputs: Sequence[Input],
    text_keys: Sequence[str] = ("text",),
    on_error: OnError = "stop",
    problems: Problems | None = None,
    limits: Limits | None = None,
) -> Iterator[tuple[str, str]]:
    """Streams all documents of all inputs, in order; several keys are joined by a line break. Empty documents are left
    out.

    Args:
        inputs: as `inputs.resolve_inputs` found them.
        text_keys: the keys of the text in each JSON object or row.
        on_error: `stop` raises at the first bad document or file; `skip` adds it to `problems` and goes on.
        problems: receives what was passed over.
        limits: of a document's length.

    Yields:
        (text, `file:line`).

    Raises:
        ReadError: something bad with `on_error="stop"`.
        UserError: a file that cannot be opened, whatever `on_error` says.
    """
    fields = Fields(tuple(text_keys), joined_by=None if len(text_keys) == 1 else "\n")
    limits = Limits() if limits is None else limits
    for source in inputs:
        places = Places(source.name, unit_of(source))
        for block in read_blocks(source, fields.columns, limits, Extent()):
            found = parse_block(block, fields, limits)
            # In the order of the file, so that everything in front of a bad document comes before the error.
            bad = iter([*found.problems, None])
            worst = next(bad)
            for number, text in zip(found.numbers, found.texts[0], strict=True):
                while worst is not None and worst[0] < number:
                    _report(places, worst, block, on_error, problems)
                    worst = next(bad)
                yield text, places.of(number, -1)
            while worst is not None:
                _report(places, worst, block, on_error, problems)
                worst = next(bad)
            if problems is not None:
                problems.count += found.unlisted
            places.skip(found.lines)


def _report(
    places: Places, problem: tuple[int, int, str], block: Block, on_error: OnError, problems: Problems | None
) -> None:
    number, byte, why = problem
    where = block.place or places.of(number, byte)
    if on_error == "stop" and why != EMPTY:
        raise ReadError(where, why)
    if problems is not None:
        problems.add(where, why)
