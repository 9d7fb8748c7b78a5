"""Cuts inputs into blocks of whole documents, so that any process can parse them, in any order, from any place on.

A block of an uncompressed `.jsonl` file is a span of bytes that its worker reads by itself; everything else is one
stream and is read here. Where the cuts are depends on the input alone, not on the number of workers, nor on where a
resumed run starts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_prealign.corpus.read_errors import ReadError

if TYPE_CHECKING:
    from megatron_prealign.corpus.inputs import Input

BLOCK_BYTES = 2 << 20
"""Text of a block: some hundred documents, so that handing it over costs nothing beside the work on it."""
MAX_DOCUMENT_BYTES = 16 << 20
"""Longest document by default, in bytes of the file; it is in memory several times over while it is encoded."""
_UTF8_BOM = b"\xef\xbb\xbf"
# What follows a skipped document's line needs to know no more of it than that it was not blank.
_LONGEST_KEPT_TAIL = 1 << 16

Kind = Literal["lines", "paragraphs", "rows"]


@dataclass(frozen=True)
class Span:
    """The lines of an uncompressed file that start in these bytes; the last one may end behind them."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Limits:
    """What bounds the memory of a block."""

    block_bytes: int = BLOCK_BYTES
    """Text of a block, as long as no document is longer."""
    document_bytes: int = MAX_DOCUMENT_BYTES
    """A longer document is refused or skipped."""


@dataclass(frozen=True)
class Block:
    """A piece of an input that holds whole documents, or the news that something there cannot be read."""

    kind: Kind
    """JSON lines, paragraphs between blank lines, or rows as `parquet.rows_of` reads them."""
    content: bytes | Span
    next_position: int
    """`read_blocks` goes on from here: a byte of an uncompressed `.jsonl` file, a row of a table, else the number of
    the block."""
    disk_bytes: int
    """Bytes of the file on disk that were read for this block, for progress."""
    problem: str | None = None
    """Why what lies here cannot be read; then there is no content."""
    lines: int = 0
    """Lines that the problem takes up."""
    source: int = 0
    """Number of its input, for those who read several."""
    place: str | None = None
    """Where the problem is, if it is not that of a line."""

    @property
    def size(self) -> int:
        """Bytes of text, before a document that reaches over the end of a span is read."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stop - self.content.start


@dataclass(frozen=True)
class Extent:
    """The part of an input that one run reads: bytes of an uncompressed `.jsonl` file, rows of a table, else all."""

    start: int = 0
    stop: int | None = None


def read_blocks(
    source: "Input", columns: Sequence[str], limits: Limits, extent: Extent, position: int = 0
) -> Iterator[Block]:
    """The blocks of an input, in order.

    Args:
        source: the input.
        columns: the columns of a table that are read.
        limits: of a block.
        extent: which part of it to read.
        position: blocks that end here or before are left out; 0 for all.

    Raises:
        UserError: the file cannot be opened. What is wrong inside it comes as a block with a `problem`.
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
        yield _nothing(source.name)
    start = max(extent.start, position)
    while start < stop:
        # Cuts lie at multiples from the file's beginning.
        end = min((start // limits.block_bytes + 1) * limits.block_bytes, stop)
        yield Block("lines", Span(source.name, start, end), end, end - start)
        start = end


def _nothing(name: str) -> Block:
    return Block("lines", b"", 1, 0, "empty file; expected at least one document", place=name)


def read_span(span: Span, limits: Limits) -> tuple[bytes, int, bool]:
    """The lines of a span.

    Returns:
        Their bytes, where in the file they begin, and whether a last line was left out because it is longer than a
        document may be.

    Raises:
        ReadError: the file cannot be read.
    """
    try:
        with open(span.path, "rb") as stream:
            # The byte before tells whether a line starts with the first one.
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
        raise ReadError(span.path, f"cannot be read ({error.strerror}); check the disk") from error
    data = b"".join(parts)
    if begin == 0 and data.startswith(_UTF8_BOM):
        return data[len(_UTF8_BOM) :], len(_UTF8_BOM), is_too_long
    return data, begin, is_too_long


def _streamed(source: "Input", limits: Limits) -> Iterator[Block]:
    """Blocks of a file that has to be read from its beginning."""
    from megatron_prealign.corpus.streams import read_chunks

    cutter = _Cutter("lines" if source.kind == "jsonl" else "paragraphs", limits)
    disk = 0
    try:
        for chunk, disk_position in read_chunks(source.name, source.compression, limits.block_bytes):
            yield from cutter.add(chunk, disk_position - disk)
            disk = disk_position
    except ReadError as error:
        # What is behind the last whole document is a piece of one.
        yield cutter.damage(error.why, source.bytes - disk)
        return
    if cutter.is_empty:
        yield _nothing(source.name)
    else:
        yield from cutter.end(source.bytes - disk)


class _Cutter:
    """Cuts a stream behind its last document so far; keeps the begun one, up to the longest that may be."""

    def __init__(self, kind: Literal["lines", "paragraphs"], limits: Limits) -> None:
        self._kind, self._limits = kind, limits
        self.is_empty = True
        self._blocks = 0
        self._lines: list[bytes] = []
        """Whole lines of a begun document."""
        self._tail = b""
        """The begun line."""
        self._disk_bytes = 0
        self._skipping = False
        """Within a document that is too long."""
        self._skipped_lines = 0

    def add(self, chunk: bytes, disk_bytes: int) -> Iterator[Block]:
        """The blocks that are whole now."""
        if self.is_empty and chunk.startswith(_UTF8_BOM):
            chunk = chunk[len(_UTF8_BOM) :]
        self.is_empty = False
        self._disk_bytes += disk_bytes
        data = self._tail + chunk
        end = data.rfind(b"\n") + 1
        whole, self._tail = data[:end], data[end:]
        if self._skipping:
            cut = self._first_cut(whole)
            self._skipped_lines += whole.count(b"\n", 0, cut or len(whole))
            if not cut:
                self._tail = self._tail if len(self._tail) <= _LONGEST_KEPT_TAIL else b"x"
                return
            whole = whole[cut:]
            yield self._too_long()
        cut = self._last_cut(whole)
        if cut:
            yield self._block(b"".join([*self._lines, whole[:cut]]))
            self._lines = []
        if whole[cut:]:
            self._lines.append(whole[cut:])
        if sum(map(len, self._lines)) + len(self._tail) > self._limits.document_bytes:
            self._skipping = True
            self._skipped_lines = sum(line.count(b"\n") for line in self._lines)
            self._lines = []
            self._tail = self._tail if len(self._tail) <= _LONGEST_KEPT_TAIL else b"x"

    def end(self, disk_bytes: int) -> Iterator[Block]:
        """The last document, when the stream is over."""
        # A compressed file's footer, too, belongs to the last block.
        self._disk_bytes += disk_bytes
        if self._skipping:
            yield self._too_long()
        else:
            yield self._block(b"".join([*self._lines, self._tail]))

    def damage(self, why: str, disk_bytes: int) -> Block:
        """What to say when the stream breaks off."""
        self._disk_bytes += disk_bytes
        return self._block(b"", why)

    def _too_long(self) -> Block:
        self._skipping = False
        return self._block(b"", too_long(self._limits), self._skipped_lines)

    def _block(self, content: bytes, problem: str | None = None, lines: int = 0) -> Block:
        disk_bytes, self._disk_bytes = self._disk_bytes, 0
        self._blocks += 1
        return Block(self._kind, content, self._blocks, disk_bytes, problem, lines)

    def _last_cut(self, lines: bytes) -> int:
        """Where the last document among whole lines ends; 0 if none does."""
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
        """Where the first one ends."""
        begin = 0
        while begin < len(lines):
            end = lines.find(b"\n", begin) + 1
            if self._kind == "lines" or not lines[begin:end].strip():
                return end
            begin = end
        return 0


def too_long(limits: Limits) -> str:
    """Why a document is refused for its length."""
    return (
        f"a document of more than {limits.document_bytes / (1 << 20):g} MiB; split it, or allow more with "
        "--max-document-mb (it is in memory several times over)"
    )


def _rows(source: "Input", columns: Sequence[str], limits: Limits, extent: Extent, position: int) -> Iterator[Block]:
    """Blocks of a table. The worker gets the columns as they are and makes Python's texts of them."""
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
            # What part of the file a row takes up, nobody knows before it is read.
            share = 0 if stop is None or stop == extent.start else (next_row - row) / (stop - extent.start)
            yield Block("rows", payload, next_row, int(source.bytes * share))
            row = next_row
    except ReadError as error:
        yield Block("rows", b"", row + 1, 0, error.why, place=error.where)
        return
    if row == first == 0:
        yield Block("rows", b"", 1, source.bytes, "no rows; expected at least one document", place=source.name)


def extents(sources: list["Input"], shard: tuple[int, int] | None) -> list[Extent | None]:
    """Which part of each input a shard reads; None for an input of which it reads nothing.

    All inputs behind each other, in bytes on disk, are cut into equal shares. A line of an uncompressed `.jsonl` file
    and a row group of a table belong to the share in which their first byte lies; of every other file the first byte
    decides for all of it. So each document belongs to exactly one shard, and the shards in their order hold the
    documents in theirs.

    Args:
        sources: the inputs.
        shard: (number, count), the number from 1; None for everything.

    Raises:
        ReadError: a damaged table.
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
    """The rows of the row groups that begin in these bytes, counting only bytes of row groups."""
    from megatron_prealign.corpus.parquet import row_groups

    first_row = last_row = None
    offset = 0
    for group in row_groups(source.name):
        # Whatever sizes the footer tells, each group begins inside the file and so belongs to a share.
        if start <= min(max(offset, 0), source.bytes - 1) < stop:
            first_row = group.first_row if first_row is None else first_row
            last_row = group.first_row + group.rows
        offset += group.disk_bytes
    return None if first_row is None else Extent(first_row, last_row)
