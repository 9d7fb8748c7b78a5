"""Splits inputs into blocks of complete documents that any process can parse, in any order.

A block of an uncompressed `.jsonl` file is a byte span that the worker reads; all other inputs are streams and are
read here. Block boundaries depend only on the input, not on the number of workers or on where a resumed run starts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_prealign.corpus.read_errors import ReadError

if TYPE_CHECKING:
    from megatron_prealign.corpus.inputs import Input

BLOCK_BYTES = 2 << 20
"""Bytes of text in a block: a few hundred documents, so that sending it to a worker costs little."""
MAX_DOCUMENT_BYTES = 16 << 20
"""Default maximum document length in bytes of the file; several copies are in memory during encoding."""
_UTF8_BOM = b"\xef\xbb\xbf"
# Of a skipped document's last line, only whether it was blank matters.
_LONGEST_KEPT_TAIL = 1 << 16

Kind = Literal["lines", "paragraphs", "rows"]


@dataclass(frozen=True)
class Span:
    """The lines of an uncompressed file that start in this byte range; the last one may end after it."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Limits:
    """Limits that bound the memory of a block."""

    block_bytes: int = BLOCK_BYTES
    """Bytes of text in a block, unless a single document is longer."""
    document_bytes: int = MAX_DOCUMENT_BYTES
    """Maximum document length; a longer document is an error or skipped."""


@dataclass(frozen=True)
class Block:
    """A part of an input that contains complete documents, or a problem in place of content that cannot be read."""

    kind: Kind
    """JSON lines, paragraphs separated by blank lines, or rows as `parquet.rows_of` reads them."""
    content: bytes | Span
    next_position: int
    """Where `read_blocks` continues: a byte offset in an uncompressed `.jsonl` file, a row of a table, otherwise the
    block number."""
    disk_bytes: int
    """Bytes read from disk for this block, for the progress display."""
    problem: str | None = None
    """Why this part cannot be read; the content is empty then."""
    lines: int = 0
    """Number of lines the problem covers."""
    source: int = 0
    """Index of the input, for callers that read several."""
    location: str | None = None
    """Location of the problem if it is not a line."""

    @property
    def size(self) -> int:
        """Bytes of text, not counting a document that continues past the end of a span."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stop - self.content.start


@dataclass(frozen=True)
class Extent:
    """Part of an input that a run reads: bytes of an uncompressed `.jsonl` file, rows of a table, else all of it."""

    start: int = 0
    stop: int | None = None


def read_blocks(
    source: "Input", columns: Sequence[str], limits: Limits, extent: Extent, position: int = 0
) -> Iterator[Block]:
    """Yields the blocks of an input, in order.

    Args:
        source: the input.
        columns: columns to read from a table.
        limits: block limits.
        extent: the part of the input to read.
        position: skip blocks that end at or before this position; 0 for all.

    Raises:
        UserError: the file cannot be opened. Errors in its contents are yielded as a block with a `problem`.
    """
    if source.kind == "jsonl" and not source.compression:
        yield from _spans(source, limits, extent, position)
    elif source.kind in ("jsonl", "txt"):
        for block in _streamed(source, limits):
            if block.next_position > position:
                yield block
    else:
        yield from _rows(source, columns, limits, extent, position)


def _spans(source: "Input", limits: Limits, extent: Extent, position: int) -> Iterator[Block]:
    stop = source.bytes if extent.stop is None else extent.stop
    if source.bytes == 0 and position == 0:
        yield _empty_file(source.name)
    start = max(extent.start, position)
    while start < stop:
        # Boundaries are multiples of the block size from the start of the file.
        end = min((start // limits.block_bytes + 1) * limits.block_bytes, stop)
        yield Block("lines", Span(source.name, start, end), end, end - start)
        start = end


def _empty_file(name: str) -> Block:
    return Block("lines", b"", 1, 0, "empty file, expected at least one document", location=name)


def read_span(span: Span, limits: Limits) -> tuple[bytes, int, bool]:
    """Reads the lines of a span.

    Returns:
        Their bytes, their start offset in the file, and whether the last line was omitted because it exceeds the
        maximum document length.

    Raises:
        ReadError: the file cannot be read.
    """
    try:
        with open(span.path, "rb") as stream:
            # The preceding byte shows whether a line starts at the first byte of the span.
            begin = max(span.start - 1, 0)
            stream.seek(begin)
            data = stream.read(span.stop - begin)
            if span.start > 0:
                first = data.find(b"\n") + 1
                if first == 0:
                    return b"", span.start, False
                begin, data = begin + first, data[first:]
            parts, size = [data], len(data)
            last_line = data.rfind(b"\n") + 1
            is_too_long = False
            while parts[-1] and not parts[-1].endswith(b"\n"):
                if size > last_line + limits.document_bytes:
                    parts, is_too_long = [data[:last_line]], True
                    break
                line_end = stream.readline(1 << 18)
                parts.append(line_end)
                size += len(line_end)
    except OSError as error:
        raise ReadError(span.path, f"cannot read file: {error.strerror}; check the disk") from error
    data = b"".join(parts)
    if begin == 0 and data.startswith(_UTF8_BOM):
        return data[len(_UTF8_BOM) :], len(_UTF8_BOM), is_too_long
    return data, begin, is_too_long


def _streamed(source: "Input", limits: Limits) -> Iterator[Block]:
    """Yields the blocks of a file that must be read from the start."""
    from megatron_prealign.corpus.streams import read_chunks

    splitter = _Splitter("lines" if source.kind == "jsonl" else "paragraphs", limits)
    disk = 0
    try:
        for chunk, disk_position in read_chunks(source.name, source.compression, limits.block_bytes):
            yield from splitter.add(chunk, disk_position - disk)
            disk = disk_position
    except ReadError as error:
        # Data after the last complete document is a partial document: drop it.
        yield splitter.failure(error.why, source.bytes - disk)
        return
    if splitter.is_empty:
        yield _empty_file(source.name)
    else:
        yield from splitter.end(source.bytes - disk)


class _Splitter:
    """Splits a stream after its last complete document; buffers the partial one, up to the maximum document length."""

    def __init__(self, kind: Literal["lines", "paragraphs"], limits: Limits) -> None:
        self._kind, self._limits = kind, limits
        self.is_empty = True
        self._blocks = 0
        self._lines: list[bytes] = []
        """Complete lines of a partial document."""
        self._tail = b""
        """Partial line."""
        self._disk_bytes = 0
        self._skipping = False
        """Whether the stream is inside a document that is too long."""
        self._skipped_lines = 0

    def add(self, chunk: bytes, disk_bytes: int) -> Iterator[Block]:
        """Yields the blocks that this chunk completes."""
        if self.is_empty and chunk.startswith(_UTF8_BOM):
            chunk = chunk[len(_UTF8_BOM) :]
        self.is_empty = False
        self._disk_bytes += disk_bytes
        data = self._tail + chunk
        end = data.rfind(b"\n") + 1
        lines, self._tail = data[:end], data[end:]
        if self._skipping:
            cut = self._first_cut(lines)
            self._skipped_lines += lines.count(b"\n", 0, cut or len(lines))
            if not cut:
                self._tail = self._tail if len(self._tail) <= _LONGEST_KEPT_TAIL else b"x"
                return
            lines = lines[cut:]
            yield self._too_long()
        cut = self._last_cut(lines)
        if cut:
            yield self._block(b"".join([*self._lines, lines[:cut]]))
            self._lines = []
        if lines[cut:]:
            self._lines.append(lines[cut:])
        if sum(map(len, self._lines)) + len(self._tail) > self._limits.document_bytes:
            self._skipping = True
            self._skipped_lines = sum(line.count(b"\n") for line in self._lines)
            self._lines = []
            self._tail = self._tail if len(self._tail) <= _LONGEST_KEPT_TAIL else b"x"

    def end(self, disk_bytes: int) -> Iterator[Block]:
        """Yields the last document at the end of the stream."""
        # The footer of a compressed file counts towards the last block.
        self._disk_bytes += disk_bytes
        if self._skipping:
            yield self._too_long()
        else:
            yield self._block(b"".join([*self._lines, self._tail]))

    def failure(self, why: str, disk_bytes: int) -> Block:
        """Returns the block that reports why the stream cannot be read further."""
        self._disk_bytes += disk_bytes
        return self._block(b"", why)

    def _too_long(self) -> Block:
        self._skipping = False
        return self._block(b"", too_long_message(self._limits), self._skipped_lines)

    def _block(self, content: bytes, problem: str | None = None, lines: int = 0) -> Block:
        disk_bytes, self._disk_bytes = self._disk_bytes, 0
        self._blocks += 1
        return Block(self._kind, content, self._blocks, disk_bytes, problem, lines)

    def _last_cut(self, lines: bytes) -> int:
        """End offset of the last complete document; 0 if there is none."""
        if self._kind == "lines":
            return len(lines)
        end = len(lines)
        while end > 0:
            begin = lines.rfind(b"\n", 0, end - 1) + 1
            if not lines[begin:end].strip():
                return end
            end = begin
        return 0

    def _first_cut(self, lines: bytes) -> int:
        """End offset of the first complete document; 0 if there is none."""
        begin = 0
        while begin < len(lines):
            end = lines.find(b"\n", begin) + 1
            if self._kind == "lines" or not lines[begin:end].strip():
                return end
            begin = end
        return 0


def too_long_message(limits: Limits) -> str:
    """Returns the error message for a document that exceeds the maximum length."""
    return (
        f"document is longer than {limits.document_bytes / (1 << 20):g} MiB; split it or raise --max-document-mb "
        "(several copies are kept in memory)"
    )


def _rows(source: "Input", columns: Sequence[str], limits: Limits, extent: Extent, position: int) -> Iterator[Block]:
    """Yields the blocks of a table as raw columns, which the worker converts to Python strings."""
    from megatron_prealign.corpus.hub import read_hub_batches
    from megatron_prealign.corpus.parquet import read_batches, row_groups

    first = row = max(extent.start, position)
    try:
        stop = extent.stop
        if source.kind == "hub":
            batches = read_hub_batches(source.name, columns, first, limits.block_bytes)
        else:
            rows = sum(group.rows for group in row_groups(source.name))
            stop = rows if stop is None else stop
            batches = read_batches(source.name, columns, first, stop, limits.block_bytes)
        for payload, next_row in batches:
            # The size of a row on disk is unknown until it is read.
            fraction = 0 if stop is None or stop == extent.start else (next_row - row) / (stop - extent.start)
            yield Block("rows", payload, next_row, int(source.bytes * fraction))
            row = next_row
    except ReadError as error:
        yield Block("rows", b"", row + 1, 0, error.why, location=error.where)
        return
    if row == first == 0:
        yield Block("rows", b"", 1, source.bytes, "no rows, expected at least one document", location=source.name)


def shard_extents(sources: list["Input"], shard: tuple[int, int] | None) -> list[Extent | None]:
    """Returns the part of each input that a shard reads; None for an input it does not read.

    The concatenated inputs are divided into shards of equal size in bytes on disk. A line of an uncompressed `.jsonl`
    file and a row group of a table belong to the shard that contains their first byte; any other file belongs entirely
    to the shard that contains its first byte. Each document therefore belongs to exactly one shard, and concatenating
    the shards in order preserves the document order.

    Args:
        sources: the inputs.
        shard: (number, count), the number from 1; None for everything.

    Raises:
        ReadError: a table is corrupt.
    """
    if shard is None:
        return [Extent() for _ in sources]
    total = sum(source.bytes for source in sources)
    begin, end = total * (shard[0] - 1) // shard[1], total * shard[0] // shard[1]
    result: list[Extent | None] = []
    first = 0
    for source in sources:
        start, stop = max(begin - first, 0), min(end - first, source.bytes)
        if source.kind == "jsonl" and not source.compression:
            result.append(Extent(start, stop) if start < stop else None)
        elif source.kind == "parquet":
            result.append(_row_extent(source, start, stop))
        else:
            result.append(Extent() if begin <= first < end else None)
        first += source.bytes
    return result


def _row_extent(source: "Input", start: int, stop: int) -> Extent | None:
    """Rows of the row groups that start in this byte range, counting only bytes of row groups."""
    from megatron_prealign.corpus.parquet import row_groups

    first_row = last_row = None
    offset = 0
    for group in row_groups(source.name):
        # Clamp the start to the file, so that each group belongs to a shard whatever sizes the footer states.
        if start <= min(max(offset, 0), source.bytes - 1) < stop:
            first_row = group.first_row if first_row is None else first_row
            last_row = group.first_row + group.rows
        offset += group.disk_bytes
    return None if first_row is None else Extent(first_row, last_row)
