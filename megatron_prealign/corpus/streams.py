"""Reads plain and compressed files in chunks, and distinguishes corrupt or truncated data from a regular end."""

import bz2
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_ZSTD_WINDOW = 128 << 20
"""Largest window that the zstd command accepts by default."""
# Compressed bytes read at a time. If they contain corrupt data, the valid data before it is lost, too.
_READ_BYTES = 1 << 14
_TRUNCATED = "truncated {} data (incomplete download or copy?); download the file again"
_CORRUPT = "corrupt {} data ({}); download the file again"

_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
_RLE_BLOCK = 1


def read_chunks(path: str, compression: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[bytes, int]]:
    """Decompresses a file in chunks. Memory use is independent of the file size and the compression ratio.

    Files with several gzip members, zstd frames or bz2 streams are read completely. Zero padding after gzip and bz2
    data, which some tools write, is skipped.

    Args:
        path: the file.
        compression: `""`, `"gz"`, `"zst"` or `"bz2"`.
        chunk_bytes: maximum chunk size.

    Yields:
        A non-empty chunk and the number of bytes read from disk so far. Nothing for an empty file.

    Raises:
        ReadError: the data is corrupt or truncated. All readable data before that is yielded first; for corrupt gzip
            and bz2 data, up to 16 KiB of the file before the error may be lost.
        UserError: the file cannot be opened, or zstandard is not installed.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below; read errors are handled separately
    except OSError as error:
        raise UserError(f"{path}: cannot open file: {error.strerror}; check the path and its permissions") from error
    with file:
        if compression == "":
            pieces = _read_plain(file, chunk_bytes)
        elif compression == "zst":
            pieces = _read_zstd(file)
        else:
            pieces = _read_members(file, compression, chunk_bytes)
        yield from _rechunk(path, file, pieces, chunk_bytes)


def _rechunk(path: str, file: BinaryIO, pieces: Iterator[bytes], chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Merges small pieces and splits large ones; yields pending data before raising an error."""
    waiting: list[bytes] = []
    size = 0
    failure: ReadError | None = None
    while True:
        try:
            piece = next(pieces, None)
        except _CorruptDataError as error:
            failure, piece = ReadError(path, str(error)), None
        except OSError as error:
            failure, piece = ReadError(path, f"cannot read file: {error.strerror or error}; check the disk"), None
        if waiting and (piece is None or size + len(piece) > chunk_bytes):
            yield b"".join(waiting), file.tell()
            waiting, size = [], 0
        if piece is None:
            break
        while len(piece) > chunk_bytes:
            yield piece[:chunk_bytes], file.tell()
            piece = piece[chunk_bytes:]
        if piece:
            waiting.append(piece)
            size += len(piece)
    if failure is not None:
        raise failure


class _CorruptDataError(Exception):
    """Compressed data is corrupt; the caller adds the path."""


def _read_plain(file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    while piece := file.read(chunk_bytes):
        yield piece


def _read_members(file: BinaryIO, compression: str, chunk_bytes: int) -> Iterator[bytes]:
    """Reads gzip and bz2: concatenated streams, each with its own end and checksum."""
    data = file.read(_READ_BYTES)
    while data:
        member = _GzipMember() if compression == "gz" else _Bz2Member()
        while not member.ended:
            try:
                piece = member.decompress(data, chunk_bytes)
            except (zlib.error, OSError, ValueError) as error:
                raise _CorruptDataError(_CORRUPT.format(member.name, error)) from error
            if piece:
                yield piece
            data = member.rest
            if not data and not member.ended and member.needs_input:
                data = file.read(_READ_BYTES)
                if not data:
                    raise _CorruptDataError(_TRUNCATED.format(member.name))
        data = _skip_padding(file, data)


def _skip_padding(file: BinaryIO, data: bytes) -> bytes:
    data = data.lstrip(b"\0")
    while not data:
        piece = file.read(_READ_BYTES)
        if not piece:
            return b""
        data = piece.lstrip(b"\0")
    return data


class _GzipMember:
    name = "gzip"

    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    def decompress(self, data: bytes, limit: int) -> bytes:
        piece = self._decompressor.decompress(data, limit)
        # After a piece of full size, output may be pending even if all input was consumed.
        self.needs_input = len(piece) < limit
        return piece

    @property
    def ended(self) -> bool:
        return self._decompressor.eof

    @property
    def rest(self) -> bytes:
        return self._decompressor.unused_data or self._decompressor.unconsumed_tail


class _Bz2Member:
    name = "bz2"

    def __init__(self) -> None:
        self._decompressor = bz2.BZ2Decompressor()

    def decompress(self, data: bytes, limit: int) -> bytes:
        return self._decompressor.decompress(data, limit)

    @property
    def ended(self) -> bool:
        return self._decompressor.eof

    @property
    def needs_input(self) -> bool:
        return self._decompressor.needs_input

    @property
    def rest(self) -> bytes:
        # The decompressor buffers unused input until the end of the stream.
        return self._decompressor.unused_data if self._decompressor.eof else b""


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    """Reads zstd frames block by block: a block decompresses to at most 128 KiB."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"{file.name}: reading .zst files requires zstandard; install it with pip install zstandard"
        ) from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    while start := file.read(4):
        if start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5:
            # A skippable frame; parallel and seekable files store metadata in them.
            size = int.from_bytes(_read_exactly(file, 4), "little")
            while size:
                size -= len(_read_exactly(file, min(size, _READ_BYTES)))
        elif start == _ZSTD_FRAME:
            try:
                yield from _read_frame(file, decompressor, zstandard.get_frame_parameters)
            except zstandard.ZstdError as error:
                raise _CorruptDataError(_CORRUPT.format("zstd", error)) from error
        elif len(start) < 4:
            raise _CorruptDataError(_TRUNCATED.format("zstd"))
        else:
            raise _CorruptDataError(
                _CORRUPT.format("zstd", f"got bytes {start.hex(' ')}, expected the start of a frame")
            )


def _read_frame(file: BinaryIO, decompressor: Any, parameters_of: Callable[[bytes], Any]) -> Iterator[bytes]:
    """Reads the blocks of a frame whose first four bytes have been read."""
    header = _ZSTD_FRAME + _read_exactly(file, 1)
    flags = header[4]
    one_segment = bool(flags & 0x20)
    header += _read_exactly(file, (not one_segment) + (0, 1, 2, 4)[flags & 3] + (int(one_segment), 2, 4, 8)[flags >> 6])
    window = parameters_of(header).window_size
    if window > MAX_ZSTD_WINDOW:
        raise _CorruptDataError(
            f"zstd window is {window >> 20:,} MiB, at most {MAX_ZSTD_WINDOW >> 20} MiB are supported; recompress "
            "without --long or --ultra"
        )
    frame = decompressor.decompressobj()
    frame.decompress(header)
    last = False
    while not last:
        block = _read_exactly(file, 3)
        value = int.from_bytes(block, "little")
        last, kind, size = bool(value & 1), value >> 1 & 3, value >> 3
        yield frame.decompress(block + _read_exactly(file, 1 if kind == _RLE_BLOCK else size))
    if flags & 4:
        yield frame.decompress(_read_exactly(file, 4))


def _read_exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise _CorruptDataError(_TRUNCATED.format("zstd"))
    return data
