"""Reads columns of parquet files in batches that fit into memory and travel to other processes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    import pyarrow

# Bytes decoded at a time if all rows were alike. Small, since rows are not: a thousand long ones may stand together.
_STEP_BYTES = 1 << 16
_MIN_STEP_ROWS, _MAX_STEP_ROWS = 16, 4096
_MAX_STEP_BYTES = 1 << 26
_READ_BUFFER_BYTES = 1 << 20
_SHOWN_COLUMNS = 8


@dataclass(frozen=True)
class RowGroup:
    """A part of a parquet file that can be read without the others."""

    first_row: int
    rows: int
    disk_bytes: int
    """About how many bytes of the file it takes up."""


def row_groups(path: str) -> list[RowGroup]:
    """The row groups of a file, from its footer alone.

    Raises:
        ReadError: no parquet file, or a damaged or cut-off one.
        UserError: it cannot be opened.
    """
    with _open(path) as file:
        # Sizes of the single columns would be exact, but asking for them ends the process on some damaged footers
        # (pyarrow 26): an exception of the C++ code that nobody catches.
        sizes = [(group.num_rows, group.total_byte_size) for group in _groups(file)]
        share = os.path.getsize(path) / max(1, sum(size for _, size in sizes))
        groups: list[RowGroup] = []
        row = 0
        for rows, size in sizes:
            groups.append(RowGroup(row, rows, int(size * share)))
            row += rows
        return groups


def read_batches(
    path: str, columns: Sequence[str], first_row: int, stop_row: int, batch_bytes: int
) -> Iterator[tuple[bytes, int]]:
    """Reads the rows from `first_row` up to but not with `stop_row`.

    Row groups are read page by page, so their size does not matter; memory is a few times the largest page, the
    smallest piece that the format can unpack (about 1 MB, or what its writer puts together as 1,024 rows). The rows in
    front of `first_row` in its row group are decoded and dropped.

    Args:
        path: the file.
        columns: the columns to read; a field inside a struct is named with dots, `data.text`.
        first_row: counted from 0.
        stop_row: may lie behind the last row.
        batch_bytes: about how many bytes of values make a batch; a batch has at least one row.

    Yields:
        The payload, which `rows_of` unpacks, and the number of the next row.

    Raises:
        ReadError: a missing column or damaged data; its place is the file, or `file:row` with rows counted from 1.
        UserError: the file cannot be opened.
    """
    with _open(path) as file:
        with _damage(path):
            schema = file.schema_arrow
        check_columns(schema, columns, path)
        parts = _rows_between(file, path, columns, first_row, stop_row)
        yield from pack_batches(parts, first_row, batch_bytes)


def check_columns(schema: "pyarrow.Schema", columns: Sequence[str], where: str) -> None:
    """Checks that all columns are there.

    Raises:
        ReadError: one is not; the message names those that are.
    """
    for column in columns:
        name = column if column in schema.names else column.partition(".")[0]
        if schema.names.count(name) > 1:
            raise ReadError(where, f"{schema.names.count(name)} columns are called {name!r}; expected one, rename them")
        if _find_field(schema, column) is None:
            present = list(_leaves(schema))
            names = ", ".join(present[:_SHOWN_COLUMNS]) + (", ..." if len(present) > _SHOWN_COLUMNS else "")
            raise ReadError(
                where, f"no column {column!r}; the columns are: {names or 'none'}; name the right one with --text-key"
            )


def select_columns(table: "pyarrow.Table", columns: Sequence[str], where: str) -> "pyarrow.Table":
    """A table of exactly the wanted columns, nested ones by their dotted names.

    Raises:
        ReadError: one is missing.
    """
    import pyarrow
    import pyarrow.compute

    check_columns(table.schema, columns, where)
    arrays = []
    for column in columns:
        top, *path = [column] if column in table.schema.names else column.split(".")
        array = table.column(top)
        arrays.append(pyarrow.compute.struct_field(array, path) if path else array)
    return pyarrow.table(arrays, names=list(columns))


def pack_batches(
    parts: Iterator["pyarrow.RecordBatch"], first_row: int, batch_bytes: int
) -> Iterator[tuple[bytes, int]]:
    """Joins small batches, and cuts large ones, to payloads of about `batch_bytes`, each with the number of the row
    behind it. What came before an error is given before it goes on."""
    waiting: list[pyarrow.RecordBatch] = []
    size, row = 0, first_row
    failure: Exception | None = None
    pieces = (piece for part in parts for piece in _cut(part, batch_bytes))
    while True:
        try:
            piece = next(pieces, None)
        except Exception as error:
            failure, piece = error, None
        if waiting and (piece is None or size + piece.nbytes > batch_bytes or piece.schema != waiting[0].schema):
            yield _payload(waiting), row
            waiting, size = [], 0
        if piece is None:
            break
        waiting.append(piece)
        size += piece.nbytes
        row += piece.num_rows
    if failure is not None:
        raise failure


def _cut(batch: "pyarrow.RecordBatch", batch_bytes: int) -> Iterator["pyarrow.RecordBatch"]:
    if batch.num_rows > 1 and batch.nbytes > batch_bytes:
        half = batch.num_rows // 2
        yield from _cut(batch.slice(0, half), batch_bytes)
        yield from _cut(batch.slice(half), batch_bytes)
    elif batch.num_rows:
        yield batch


def rows_of(payload: bytes) -> dict[str, list[Any]]:
    """The values of a payload: column -> Python values, None where a row has none.

    Text that is not UTF-8 stays `bytes`, so that the reader can say so of its row; binary columns with UTF-8 in them,
    as some writers leave text, become `str`.
    """
    import pyarrow

    with pyarrow.ipc.open_stream(payload) as reader:
        table = reader.read_all()
    return {name: _values(table.column(name)) for name in table.column_names}


def _payload(batches: list["pyarrow.RecordBatch"]) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batches[0].schema) as writer:
        writer.write_table(pyarrow.Table.from_batches(batches).combine_chunks())
    return sink.getvalue().to_pybytes()


def _values(column: "pyarrow.ChunkedArray") -> list[Any]:
    import pyarrow

    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    binary = any(
        test(kind) for test in (pyarrow.types.is_binary, pyarrow.types.is_large_binary, pyarrow.types.is_binary_view)
    )
    if not binary:
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            column = column.cast(kind).cast(pyarrow.large_binary())
    return [value if value is None else _decoded(value) for value in column.to_pylist()]


def _decoded(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value


@contextmanager
def _open(path: str) -> Iterator[Any]:
    """The file as `pyarrow.parquet.ParquetFile`, reading column by column through small buffers."""
    import pyarrow.parquet

    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed below, apart from the errors of opening
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from error
    with raw:
        with _damage(path):
            # Otherwise all of a row group's columns are fetched before the first row comes out.
            file = pyarrow.parquet.ParquetFile(
                raw, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES, page_checksum_verification=True
            )
        with file:
            yield file


@contextmanager
def _damage(where: str) -> Iterator[None]:
    """Turns pyarrow's errors about a file into ours."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise ReadError(where, f"damaged or cut-off parquet data ({told[:200]}); fetch the file again") from error


def _rows_between(
    file: Any, path: str, columns: Sequence[str], first_row: int, stop_row: int
) -> Iterator["pyarrow.RecordBatch"]:
    import pyarrow

    row = 0
    for index, group in enumerate(_groups(file)):
        begin, row = row, row + group.num_rows
        if row <= first_row or begin >= stop_row:
            continue
        at = begin
        steps = file.iter_batches(_step_rows(group), row_groups=[index], columns=list(columns), use_threads=False)
        while at < min(row, stop_row):
            with _damage(f"{path}:{at + 1}"):
                batch = next(steps, None)
            if batch is None:
                raise ReadError(f"{path}:{at + 1}", "damaged parquet data (fewer rows than promised); fetch it again")
            low, high = max(first_row - at, 0), min(stop_row - at, batch.num_rows)
            at += batch.num_rows
            if low < high:
                table = pyarrow.Table.from_batches([batch.slice(low, high - low)])
                yield from select_columns(table, columns, path).to_batches()


def _groups(file: Any) -> list[Any]:
    return [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]


def _step_rows(group: Any) -> int:
    """Rows to decode at a time, by the average row with all its columns, wanted or not."""
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    fewest = max(1, min(_MIN_STEP_ROWS, _MAX_STEP_BYTES // row_bytes))
    return max(fewest, min(_MAX_STEP_ROWS, _STEP_BYTES // row_bytes))


def _find_field(schema: "pyarrow.Schema", column: str) -> Any:
    """The field of a column by its own name, or of a field inside structs by its dotted name; None if missing."""
    import pyarrow

    if column in schema.names:
        return schema.field(column)
    fields: Any = schema
    field = None
    for name in column.split("."):
        if fields is None or fields.get_field_index(name) < 0:
            return None
        field = fields.field(fields.get_field_index(name))
        fields = field.type if pyarrow.types.is_struct(field.type) else None
    return field


def _leaves(fields: Any, prefix: str = "") -> Iterator[str]:
    import pyarrow

    for index in range(len(fields.names) if hasattr(fields, "names") else fields.num_fields):
        field = fields.field(index)
        if pyarrow.types.is_struct(field.type):
            yield from _leaves(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name
