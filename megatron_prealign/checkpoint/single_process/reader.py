"""Reads the tensors of a checkpoint in one process, without a process group.

torch's own reader (`torch.distributed.checkpoint`) needs the complete state in memory; here one tensor, or one layer of
it, is read at a time, from the file into the result. `convert to-hf`, which reads through this module, converts 8
billion parameters in bf16 (16.06 GB) in 36.9 s on two CPU cores, with 1,003 MiB of memory on top of the libraries; the
largest tensor has 1,002 MiB. `cp` of the same bytes took 27 to 50 s on that disk (`docs/conversion.md`, Speed).

Format: `.metadata` has the file, offset and length of each chunk of each tensor, and each chunk is a small `torch.save`
archive inside a `.distcp` file. The tensors of the layers are stacked: `decoder.layers.mlp.linear_fc2.weight` has shape
`[layers, hidden, ffn_hidden]`.
"""

import io
import math
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

from megatron_prealign.checkpoint.torch_dist import METADATA, read_metadata
from megatron_prealign.errors import UserError

# Linux reads at most this much in one call.
_READ_BYTES = 0x7FFF_F000
_ZIP_HEADER = struct.Struct("<4s22xHH")
_ZIP_MAGIC = b"PK\x03\x04"


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Chunk:
    """One chunk of a tensor and its location."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


class _FileSlice(io.RawIOBase):
    """Range of a file as a read-only file."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        super().__init__()
        self._descriptor, self._start, self._length, self._at = descriptor, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [view], self._start + self._at) if len(view) else 0
        self._at += count
        return count


class ShardReader:
    """Reads tensors of a checkpoint directory one at a time.

    Args:
        directory: Checkpoint directory.

    Raises:
        UserError: `.metadata` is missing or corrupt, or has chunks that do not fit their tensors.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, int] = {}
        metadata = self._read_metadata()
        self._chunks: dict[str, list[_Chunk]] = {}
        tensors: dict[str, TensorInfo] = {}
        try:
            for key, entry in metadata.state_dict_metadata.items():
                if isinstance(entry, dcp.TensorStorageMetadata):
                    tensors[key] = TensorInfo(tuple(entry.size), entry.properties.dtype)
                    self._chunks[key] = list(self._chunks_of(key, entry, metadata.storage_data))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._corrupt(f"{METADATA}: {type(error).__name__}: {error}") from error
        self.tensors: Mapping[str, TensorInfo] = tensors
        """Name -> shape and dtype of every tensor."""

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """Returns a tensor, or one layer of a stacked one; it is allocated once and filled from the files.

        Args:
            key: A name of `tensors`.
            layer: Index in dimension 0, which is then dropped.

        Raises:
            KeyError: there is no such tensor.
            UserError: a file is missing, corrupt or does not match `.metadata`.
        """
        info, chunks = self.tensors[key], self._chunks[key]
        start = [0] * len(info.shape)
        shape = list(info.shape)
        if layer is not None:
            if not shape or not 0 <= layer < shape[0]:
                raise IndexError(f"{key}: layer {layer} is out of range for shape {info.shape}")
            start[0], shape[0] = layer, 1
        selected = [(chunk, region) for chunk in chunks if (region := _overlap(chunk, start, shape)) is not None]
        elements = sum(math.prod(stop - begin for begin, stop in region) for _, region in selected)
        if elements != math.prod(shape):
            raise self._corrupt(f"{key}: {METADATA} covers {elements:,} of {math.prod(shape):,} elements")
        # Duplicate chunks would hide missing ones, whose elements would stay uninitialised.
        if any(_intersect(one, other) for (_, one), (_, other) in combinations(selected, 2)):
            raise self._corrupt(f"{key}: {METADATA} covers some elements twice")
        for chunk, _ in selected:
            self._check_length(key, chunk)
        out = torch.empty(shape, dtype=info.dtype)
        for chunk, region in selected:
            target = out[tuple(slice(b - s, e - s) for (b, e), s in zip(region, start, strict=True))]
            is_complete = [stop - begin for begin, stop in region] == list(chunk.shape)
            if is_complete and target.is_contiguous():
                self._read_chunk(key, chunk, target)
            else:
                loaded = torch.empty(chunk.shape, dtype=info.dtype)
                self._read_chunk(key, chunk, loaded)
                inner = tuple(slice(b - s, e - s) for (b, e), s in zip(region, chunk.start, strict=True))
                target.copy_(loaded[inner])
        return out if layer is None else out[0]

    def _read_metadata(self) -> dcp.Metadata:
        try:
            return read_metadata(self._directory / METADATA)
        except FileNotFoundError as error:
            raise UserError(f"{self._directory}: {METADATA} not found; expected a checkpoint directory") from error
        except (OSError, ValueError) as error:
            raise self._corrupt(f"{METADATA}: {error}") from error

    def _chunks_of(self, key: str, entry: Any, storage: Mapping[Any, Any]) -> Iterator[_Chunk]:
        shape, size = tuple(entry.size), entry.properties.dtype.itemsize
        for chunk in entry.chunks:
            location = storage[dcp.MetadataIndex(key, chunk.offsets)]
            start, extent = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = len(start) == len(extent) == len(shape) and all(
                begin >= 0 and count >= 0 and begin + count <= bound
                for begin, count, bound in zip(start, extent, shape, strict=True)
            )
            name = location.relative_path
            # `open` raises ValueError for a name with a null byte.
            if not inside or Path(name).name != name or "\0" in name or location.offset < 0:
                raise ValueError(f"{key}: chunk at {start} is out of bounds")
            # Together with the check of the file's length before reading: a corrupt shape cannot allocate more memory
            # than the file has bytes.
            if math.prod(extent) * size > location.length:
                raise ValueError(f"{key}: chunk at {start} has more elements than bytes")
            yield _Chunk(start, extent, name, location.offset, location.length)

    def _read_chunk(self, key: str, chunk: _Chunk, target: torch.Tensor) -> None:
        descriptor = self._open(chunk.file)
        archive = io.BufferedReader(_FileSlice(descriptor, chunk.offset, chunk.length))
        try:
            stored = torch.load(archive, map_location="meta", weights_only=True)
            is_tensor = isinstance(stored, torch.Tensor)
            if not (is_tensor and stored.shape == chunk.shape and stored.dtype == target.dtype):
                got = f"{list(stored.shape)} {stored.dtype}" if is_tensor else stored
                raise ValueError(f"got {got}, expected {list(chunk.shape)} {target.dtype}")
            if stored.is_contiguous():
                start, length = _storage_of(descriptor, chunk)
                skip = stored.storage_offset() * stored.element_size()
                if length < skip + target.nbytes:
                    raise ValueError(f"its data has {length:,} bytes, expected {skip + target.nbytes:,}")
                _read_into(descriptor, start + skip, target)
            else:
                archive.seek(0)
                target.copy_(torch.load(archive, map_location="cpu", weights_only=True))
        except MemoryError:
            raise
        except Exception as error:  # torch and zipfile raise many exception types for a corrupt archive.
            reason = (str(error).splitlines() or [""])[0]
            raise self._corrupt(f"{key} in {chunk.file}: {type(error).__name__}: {reason}") from error

    def _check_length(self, key: str, chunk: _Chunk) -> None:
        """Checks that the file contains the chunk, before memory is allocated for it."""
        size = os.fstat(self._open(chunk.file)).st_size
        if chunk.offset + chunk.length > size:
            raise self._corrupt(
                f"{key}: {chunk.file} has {size:,} bytes, expected at least {chunk.offset + chunk.length:,}"
            )

    def _open(self, name: str) -> int:
        if name not in self._files:
            try:
                self._files[name] = os.open(self._directory / name, os.O_RDONLY)
            except OSError as error:
                raise self._corrupt(f"cannot open {name}: {error.strerror}") from error
        return self._files[name]

    def _corrupt(self, reason: str) -> UserError:
        return UserError(f"{self._directory} is corrupt ({reason}); use another checkpoint or copy this one again")


def _overlap(chunk: _Chunk, start: list[int], shape: list[int]) -> list[tuple[int, int]] | None:
    """Intersection of a chunk with a region as (begin, stop) of each dimension; None if it is empty."""
    region = [
        (max(own, begin), min(own + size, begin + extent))
        for own, size, begin, extent in zip(chunk.start, chunk.shape, start, shape, strict=True)
    ]
    return None if any(begin >= stop for begin, stop in region) else region


def _intersect(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    return all(begin < stop and start < end for (begin, end), (start, stop) in zip(one, other, strict=True))


def _storage_of(descriptor: int, chunk: _Chunk) -> tuple[int, int]:
    """Offset in the file and size, in bytes, of the only storage of a chunk's archive."""
    with zipfile.ZipFile(io.BufferedReader(_FileSlice(descriptor, chunk.offset, chunk.length))) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
    if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("its archive does not have exactly one uncompressed storage")
    header = os.pread(descriptor, _ZIP_HEADER.size, chunk.offset + entries[0].header_offset)
    magic, name_bytes, extra_bytes = _ZIP_HEADER.unpack(header)
    if magic != _ZIP_MAGIC:
        raise ValueError("its storage has no zip header")
    start = chunk.offset + entries[0].header_offset + _ZIP_HEADER.size + name_bytes + extra_bytes
    return start, entries[0].file_size


def _read_into(descriptor: int, offset: int, target: torch.Tensor) -> None:
    view = target.view(-1).view(torch.uint8).numpy().data
    while len(view):
        count = os.preadv(descriptor, [view[:_READ_BYTES]], offset)
        if not count:
            raise ValueError(f"the file is truncated by {len(view):,} bytes")
        view, offset = view[count:], offset + count
