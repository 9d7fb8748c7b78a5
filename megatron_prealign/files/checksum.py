"""Checksums of large files: one number for each 64 MiB, so that several cores can share a file, and one over those."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_prealign.errors import UserError

CHECKSUM_BLOCK = 64 * 1024 * 1024
"""Bytes of a block; part of the definition of the checksum."""
_READ_BYTES = 4 * 1024 * 1024


class Checksum:
    """The checksum of a stream: xxh3_128 over the xxh3_64 of each of its blocks of 64 MiB, the last one shorter."""

    def __init__(self) -> None:
        import xxhash

        self._new = xxhash.xxh3_64
        self._finished: list[bytes] = []
        self._block = self._new()
        self._room = CHECKSUM_BLOCK

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Adds bytes; of a numpy array its `data`, if its elements lie one behind the other."""
        view = memoryview(data)
        # A view without elements cannot be cast.
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while len(view):
            part = view[: self._room]
            self._block.update(part)
            self._room -= len(part)
            view = view[len(part) :]
            if self._room == 0:
                self._finished.append(self._block.digest())
                self._block, self._room = self._new(), CHECKSUM_BLOCK

    def hexdigest(self) -> str:
        """`xxh3:` and 32 hexadecimal digits, of what was added so far; more may be added afterwards."""
        rest = [] if self._room == CHECKSUM_BLOCK else [self._block.digest()]
        return checksum_of_blocks([*self._finished, *rest])


def checksum_of_blocks(digests: Iterable[bytes]) -> str:
    """What `Checksum.hexdigest` gives for a stream whose blocks have these xxh3_64 digests, in their order."""
    import xxhash

    return f"xxh3:{xxhash.xxh3_128(b''.join(digests)).hexdigest()}"


def file_checksum(path: Path, workers: int = 1, progress: Callable[[int], None] | None = None) -> str:
    """The checksum of a file. Memory: 4 MiB a worker.

    Args:
        path: the file.
        workers: threads; reading and hashing let go of Python's lock.
        progress: told the bytes of each finished block, in the order of the file.

    Raises:
        UserError: the file cannot be read, or becomes shorter while it is read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its path and permissions") from error
    digests: list[bytes] = []
    try:
        size = os.fstat(descriptor).st_size
        starts = range(0, size, CHECKSUM_BLOCK)
        with ThreadPoolExecutor(workers) as pool:
            for start, digest in zip(
                starts, pool.map(lambda start: _digest_at(path, descriptor, start, size), starts), strict=True
            ):
                digests.append(digest)
                if progress is not None:
                    progress(min(CHECKSUM_BLOCK, size - start))
    finally:
        os.close(descriptor)
    return checksum_of_blocks(digests)


def _digest_at(path: Path, descriptor: int, start: int, size: int) -> bytes:
    import xxhash

    digest = xxhash.xxh3_64()
    stop = min(start + CHECKSUM_BLOCK, size)
    while start < stop:
        try:
            data = os.pread(descriptor, min(_READ_BYTES, stop - start), start)
        except OSError as error:
            raise UserError(f"{path}: cannot be read at byte {start:,} ({error.strerror}); copy it again") from error
        if not data:
            raise UserError(f"{path}: became shorter than {size:,} bytes while it was read; who else writes to it?")
        digest.update(data)
        start += len(data)
    return digest.digest()
