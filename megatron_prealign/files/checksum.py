"""Checksums of large files: a hash per 64 MiB block, computed in parallel, and a hash over the block hashes."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.files.threads import stoppable_threads

CHECKSUM_BLOCK = 64 * 1024 * 1024
"""Block size in bytes; part of the definition of the checksum."""
_READ_BYTES = 4 * 1024 * 1024


class Checksum:
    """Checksum of a stream: xxh3_128 over the xxh3_64 digests of its 64 MiB blocks; the last block may be shorter."""

    def __init__(self) -> None:
        import xxhash

        self._new = xxhash.xxh3_64
        self._finished: list[bytes] = []
        self._block = self._new()
        self._remaining = CHECKSUM_BLOCK

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Adds bytes; for a contiguous numpy array pass its `data`."""
        view = memoryview(data)
        # An empty view cannot be cast.
        view = view.cast("B") if view.nbytes else memoryview(b"")
        while len(view):
            part = view[: self._remaining]
            self._block.update(part)
            self._remaining -= len(part)
            view = view[len(part) :]
            if self._remaining == 0:
                self._finished.append(self._block.digest())
                self._block, self._remaining = self._new(), CHECKSUM_BLOCK

    def hexdigest(self) -> str:
        """Checksum of the bytes added so far: `xxh3:` and 32 hexadecimal digits. More bytes may be added afterwards."""
        rest = [] if self._remaining == CHECKSUM_BLOCK else [self._block.digest()]
        return checksum_of_blocks([*self._finished, *rest])


def checksum_of_blocks(digests: Iterable[bytes]) -> str:
    """Returns `Checksum.hexdigest` of a stream whose blocks have these xxh3_64 digests, in order."""
    import xxhash

    return f"xxh3:{xxhash.xxh3_128(b''.join(digests)).hexdigest()}"


def file_checksum(path: Path, workers: int = 1, progress: Callable[[int], None] | None = None) -> str:
    """Computes the checksum of a file. Memory: 4 MiB per worker.

    Args:
        path: The file.
        workers: Number of threads; reading and hashing release the GIL.
        progress: Called with the size in bytes of each read, by each of the threads; an error that it raises ends all.

    Raises:
        UserError: The file cannot be read, or it shrinks while it is read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check its path and permissions") from error
    try:
        size = os.fstat(descriptor).st_size
        with stoppable_threads(workers) as (pool, check):

            def count(amount: int) -> None:
                check()
                if progress is not None:
                    progress(amount)

            starts = range(0, size, CHECKSUM_BLOCK)
            digests = list(pool.map(lambda start: _block_digest(path, descriptor, start, size, count), starts))
    finally:
        os.close(descriptor)
    return checksum_of_blocks(digests)


def _block_digest(path: Path, descriptor: int, start: int, size: int, count: Callable[[int], None]) -> bytes:
    import xxhash

    digest = xxhash.xxh3_64()
    stop = min(start + CHECKSUM_BLOCK, size)
    while start < stop:
        try:
            data = os.pread(descriptor, min(_READ_BYTES, stop - start), start)
        except OSError as error:
            raise UserError(f"cannot read {path} at byte {start:,}: {error.strerror}; copy it again") from error
        if not data:
            raise UserError(f"{path}: shrank below {size:,} bytes while it was read; is another process writing to it?")
        digest.update(data)
        start += len(data)
        count(len(data))
    return digest.digest()
