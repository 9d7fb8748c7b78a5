"""Reads columns of Parquet files in batches of bounded size that can be sent to other processes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    import pyarrow

# Bytes decoded at a time for rows of average size. Small because sizes vary: a thousand long rows may be adjacent.
_STEP_BYTES = 1 << 16
_MIN_STEP_ROWS, _MAX_STEP_ROWS = 16, 4096
_MAX_STEP_BYTES = 1 << 26
_READ_BUFFER_BYTES = 1 << 20
_SHOWN_COLUMNS = 8


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file."""

    first_row: int
    rows: int
    disk_bytes: int
    """Approximate size in the file."""


def row_groups(path: str) -> list[RowGroup]:
    """Reads the row groups of a file from its footer.

    Raises:
        ReadError: the file is not Parquet, corrupt or truncated.
        UserError: the file cannot be opened.
    """
    with _open(path) as file:
        # Column sizes would be exact, but reading them aborts the process on some corrupt footers (pyarrow 26): an
        # uncaught C++ exception.
        sizes = [(group.num_rows, group.total_byte_size) for group in _groups(file)]
        ratio = os.path.getsize(path) / max(1, sum(size for _, size in sizes))
        groups: list[RowGroup] = []
        row = 0
        for rows, size in sizes:
            groups.append(RowGroup(row, rows, int(size * ratio)))
            row += rows
        return groups


def read_batches(
    path: str, columns: Sequence[str], first_row: int, stop_row: int, batch_bytes: int
) -> Iterator[tuple[bytes, int]]:
    """Reads the rows from `first_row` up to, but not including, `stop_row`.

    Row groups are read page by page, so their size does not matter. Memory is a few times the largest page, the
    smallest unit the format can decompress (about 1 MB, or 1,024 rows with some writers). Rows before `first_row` in
    its row group are decoded and dropped.

    Args:
        path: the file.
        columns: columns to read; a field inside a struct is named with dots, `data.text`.
        first_row: first row, counted from 0.
        stop_row: row to stop at; may exceed the number of rows.
        batch_bytes: approximate size of a batch in bytes of values; a batch has at least one row.

    Yields:
        The payload, which `rows_of` unpacks, and the number of the next row.

    Raises:
        ReadError: a column is missing or data is corrupt; located by file, or by `file:row` with rows counted from 1.
        UserError: the file cannot be opened.
    """
    with _open(path) as file:
        with _as_read_error(path):
            schema = file.schema_arrow
        check_columns(schema, columns, path)
        parts = _rows_between(file, path, columns, first_row, stop_row)
        yield from pack_batches(parts, first_row, batch_bytes)


def check_columns(schema: "pyarrow.Schema", columns: Sequence[str], where: str) -> None:
    """Checks that all columns exist.

    Raises:
        ReadError: a column is missing; the message lists the existing ones.
    """
    for column in columns:
        name = column if column in schema.names else column.partition(".")[0]
        if schema.names.count(name) > 1:
            raise ReadError(
                where, f"{schema.names.count(name)} columns are named {name!r}, expected one; rename the others"
            )
        if _find_field(schema, column) is None:
            present = list(_leaves(schema))
            names = ", ".join(present[:_SHOWN_COLUMNS]) + (", ..." if len(present) > _SHOWN_COLUMNS else "")
            raise ReadError(where, f"no column {column!r}; columns: {names or 'none'}; select one with --text-key")


def select_columns(table: "pyarrow.Table", columns: Sequence[str], where: str) -> "pyarrow.Table":
    """Returns a table of the requested columns, nested ones under their dotted names.

    Raises:
        ReadError: a column is missing.
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
    """Merges small batches and splits large ones into payloads of about `batch_bytes`, each with the number of the next
    row. Rows before an error are yielded before it is raised."""
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
    """Unpacks a payload: column -> Python values, None for null.

    Text that is not UTF-8 stays `bytes`, so that the reader can report the row; binary columns that contain UTF-8, as
    some writers store text, become `str`.
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
    """Opens a file as `pyarrow.parquet.ParquetFile` that reads column by column through small buffers."""
    import pyarrow.parquet

    try:
        raw = open(path, "rb")  # noqa: SIM115 - closed below, apart from the errors of opening
    except OSError as error:
        raise UserError(f"{path}: cannot open file: {error.strerror}; check the path and its permissions") from error
    with raw:
        with _as_read_error(path):
            # With pre-buffering, all columns of a row group are fetched before the first row.
            file = pyarrow.parquet.ParquetFile(
                raw, pre_buffer=False, buffer_size=_READ_BUFFER_BYTES, page_checksum_verification=True
            )
        with file:
            yield file


@contextmanager
def _as_read_error(where: str) -> Iterator[None]:
    """Converts pyarrow's errors about a file to `ReadError`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ReadError(
            where, f"corrupt or truncated parquet data ({reason[:200]}); download the file again"
        ) from error


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
            with _as_read_error(f"{path}:{at + 1}"):
                batch = next(steps, None)
            if batch is None:
                raise ReadError(
                    f"{path}:{at + 1}", "corrupt parquet data (fewer rows than the footer declares); download it again"
                )
            low, high = max(first_row - at, 0), min(stop_row - at, batch.num_rows)
            at += batch.num_rows
            if low < high:
                table = pyarrow.Table.from_batches([batch.slice(low, high - low)])
                yield from select_columns(table, columns, path).to_batches()


def _groups(file: Any) -> list[Any]:
    return [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]


def _step_rows(group: Any) -> int:
    """Number of rows to decode at a time, from the average row size over all columns, requested or not."""
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    fewest = max(1, min(_MIN_STEP_ROWS, _MAX_STEP_BYTES // row_bytes))
    return max(fewest, min(_MAX_STEP_ROWS, _STEP_BYTES // row_bytes))


def _find_field(schema: "pyarrow.Schema", column: str) -> Any:
    """Finds a column by its name, or a field inside structs by its dotted name; None if missing."""
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
