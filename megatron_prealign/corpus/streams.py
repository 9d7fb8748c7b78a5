"""Reads files piece by piece, plain or compressed, and tells damage from a proper end."""

import bz2
import zlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.errors import UserError

CHUNK_BYTES = 1 << 20
MAX_ZSTD_WINDOW = 128 << 20
"""The largest window that the zstd command itself takes without being told."""
# Compressed bytes at a time. Of these, what decompresses in front of a damaged place is lost with it.
_READ_BYTES = 1 << 14
_CUT_OFF = "the {} data ends too early (a cut-off download or copy?); fetch the file again"
_DAMAGED = "damaged {} data ({}); fetch the file again"

_ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
_RLE_BLOCK = 1


def read_chunks(path: str, compression: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[bytes, int]]:
    """Decompresses a file in pieces, in memory that neither the file's size nor its compression ratio changes.

    Files of several gzip members, zstd frames or bz2 streams are read to their end. Zeros behind gzip and bz2 data,
    which some tools pad with, are passed over.

    Args:
        path: the file.
        compression: `""`, `"gz"`, `"zst"` or `"bz2"`.
        chunk_bytes: most bytes of a piece.

    Yields:
        A piece, never empty, and how many bytes of the file on disk have been read by then. Nothing for an empty file.

    Raises:
        ReadError: damaged data, or a file that ends too early. Everything readable in front of it comes first; of
            damaged gzip and bz2 data, up to 16 KiB of the file before the damage may be lost.
        UserError: the file cannot be opened, or the package for zstd is missing.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, apart from the errors of reading
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check the path and its permissions") from error
    with file:
        if compression == "":
            pieces = _read_plain(file, chunk_bytes)
        elif compression == "zst":
            pieces = _read_zstd(file)
        else:
            pieces = _read_members(file, compression, chunk_bytes)
        yield from _gather(path, file, pieces, chunk_bytes)


def _gather(path: str, file: BinaryIO, pieces: Iterator[bytes], chunk_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Joins small pieces and cuts large ones; gives what is at hand before an error goes on."""
    waiting: list[bytes] = []
    size = 0
    damage: ReadError | None = None
    while True:
        try:
            piece = next(pieces, None)
        except _Damaged as error:
            damage, piece = ReadError(path, str(error)), None
        except OSError as error:
            damage, piece = ReadError(path, f"cannot be read ({error.strerror or error}); check the disk"), None
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
    if damage is not None:
        raise damage


class _Damaged(Exception):
    """What is wrong with compressed data; the path is added where it is known."""


def _read_plain(file: BinaryIO, chunk_bytes: int) -> Iterator[bytes]:
    while piece := file.read(chunk_bytes):
        yield piece


def _read_members(file: BinaryIO, compression: str, chunk_bytes: int) -> Iterator[bytes]:
    """gzip and bz2: streams one behind the other, each with its own end and checksum."""
    data = file.read(_READ_BYTES)
    while data:
        member = _GzipMember() if compression == "gz" else _Bz2Member()
        while not member.ended:
            try:
                piece = member.decompress(data, chunk_bytes)
            except (zlib.error, OSError, ValueError) as error:
                raise _Damaged(_DAMAGED.format(member.name, error)) from error
            if piece:
                yield piece
            data = member.rest
            if not data and not member.ended and member.hungry:
                data = file.read(_READ_BYTES)
                if not data:
                    raise _Damaged(_CUT_OFF.format(member.name))
        data = _behind_padding(file, data)


def _behind_padding(file: BinaryIO, data: bytes) -> bytes:
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
        self.hungry = True

    def decompress(self, data: bytes, limit: int) -> bytes:
        piece = self._decompressor.decompress(data, limit)
        # A piece of full size may not be all that the data holds, even if it was taken in completely.
        self.hungry = len(piece) < limit
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
    def hungry(self) -> bool:
        return self._decompressor.needs_input

    @property
    def rest(self) -> bytes:
        # What it has not used yet it keeps itself, until the end of the stream.
        return self._decompressor.unused_data if self._decompressor.eof else b""


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    """zstd frames, block by block: a block holds at most 128 KiB, however much smaller it is on disk."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            f"{file.name}: the package zstandard is needed to read .zst files; install it with pip install zstandard"
        ) from error
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    while start := file.read(4):
        if start[1:] == b"\x2a\x4d\x18" and start[0] >> 4 == 5:
            # A frame without data; parallel and seekable files keep notes in such.
            size = int.from_bytes(_exactly(file, 4), "little")
            while size:
                size -= len(_exactly(file, min(size, _READ_BYTES)))
        elif start == _ZSTD_FRAME:
            try:
                yield from _read_frame(file, decompressor, zstandard.get_frame_parameters)
            except zstandard.ZstdError as error:
                raise _Damaged(_DAMAGED.format("zstd", error)) from error
        elif len(start) < 4:
            raise _Damaged(_CUT_OFF.format("zstd"))
        else:
            raise _Damaged(_DAMAGED.format("zstd", f"bytes {start.hex(' ')} where a frame should start"))


def _read_frame(file: BinaryIO, decompressor: Any, parameters_of: Callable[[bytes], Any]) -> Iterator[bytes]:
    """The blocks of a frame whose first four bytes have been read."""
    header = _ZSTD_FRAME + _exactly(file, 1)
    flags = header[4]
    one_segment = bool(flags & 0x20)
    header += _exactly(file, (not one_segment) + (0, 1, 2, 4)[flags & 3] + (int(one_segment), 2, 4, 8)[flags >> 6])
    window = parameters_of(header).window_size
    if window > MAX_ZSTD_WINDOW:
        raise _Damaged(
            f"the zstd data needs a window of {window >> 20:,} MiB of memory, at most {MAX_ZSTD_WINDOW >> 20} are "
            "given; compress it again without --long or --ultra"
        )
    frame = decompressor.decompressobj()
    frame.decompress(header)
    last = False
    while not last:
        block = _exactly(file, 3)
        value = int.from_bytes(block, "little")
        last, kind, size = bool(value & 1), value >> 1 & 3, value >> 3
        yield frame.decompress(block + _exactly(file, 1 if kind == _RLE_BLOCK else size))
    if flags & 4:
        yield frame.decompress(_exactly(file, 4))


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise _Damaged(_CUT_OFF.format("zstd"))
    return data
