"""The tensors of a checkpoint, read by one process without a process group.

A checkpoint's tensors lie in torch's distributed format (`torch.distributed.checkpoint`): `.metadata` says which part
of which tensor lies where, and every part is a small archive of `torch.save` inside a `.distcp` file. torch's own
reader wants the whole state in memory; here one tensor, or one layer of it, is read at a time, straight from the file
into place. The tensors of the layers are stacked: `decoder.layers.mlp.linear_fc2.weight` is `[layers, hidden, width]`.
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
    """What a checkpoint says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Part:
    """One part of a tensor and where it lies."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


class _Slice(io.RawIOBase):
    """A range of a file as a file."""

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
    """Reads tensors of a checkpoint directory one by one.

    Args:
        directory: The checkpoint.

    Raises:
        UserError: its `.metadata` is missing or damaged, or names parts that do not fit its tensors.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, int] = {}
        metadata = self._read_metadata()
        self._parts: dict[str, list[_Part]] = {}
        facts: dict[str, TensorInfo] = {}
        try:
            for key, entry in metadata.state_dict_metadata.items():
                if isinstance(entry, dcp.TensorStorageMetadata):
                    facts[key] = TensorInfo(tuple(entry.size), entry.properties.dtype)
                    self._parts[key] = list(self._parts_of(key, entry, metadata.storage_data))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"{METADATA}: {type(error).__name__}: {error}") from error
        self.tensors: Mapping[str, TensorInfo] = facts
        """Name -> shape and type of every tensor."""

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """A whole tensor, or one layer of a stacked one; it is allocated once and filled from the files.

        Args:
            key: A name of `tensors`.
            layer: Which index of dimension 0; that dimension is then gone.

        Raises:
            KeyError: there is no such tensor.
            UserError: a file is missing, damaged or does not hold what `.metadata` says.
        """
        facts, parts = self.tensors[key], self._parts[key]
        start = [0] * len(facts.shape)
        shape = list(facts.shape)
        if layer is not None:
            if not shape or not 0 <= layer < shape[0]:
                raise IndexError(f"{key} has shape {facts.shape}, there is no layer {layer}")
            start[0], shape[0] = layer, 1
        wanted = [(part, region) for part in parts if (region := _overlap(part, start, shape)) is not None]
        elements = sum(math.prod(stop - begin for begin, stop in region) for _, region in wanted)
        if elements != math.prod(shape):
            raise self._damaged(f"{key}: {METADATA} places {elements:,} of its {math.prod(shape):,} elements")
        # Parts that are there twice would hide others that are not: of those nothing would be filled.
        if any(_meet(one, other) for (_, one), (_, other) in combinations(wanted, 2)):
            raise self._damaged(f"{key}: {METADATA} places some of its elements twice")
        for part, _ in wanted:
            self._check_length(key, part)
        out = torch.empty(shape, dtype=facts.dtype)
        for part, region in wanted:
            target = out[tuple(slice(b - s, e - s) for (b, e), s in zip(region, start, strict=True))]
            whole = [stop - begin for begin, stop in region] == list(part.shape)
            if whole and target.is_contiguous():
                self._read_part(key, part, target)
            else:
                loaded = torch.empty(part.shape, dtype=facts.dtype)
                self._read_part(key, part, loaded)
                inner = tuple(slice(b - s, e - s) for (b, e), s in zip(region, part.start, strict=True))
                target.copy_(loaded[inner])
        return out if layer is None else out[0]

    def _read_metadata(self) -> dcp.Metadata:
        try:
            return read_metadata(self._directory / METADATA)
        except FileNotFoundError as error:
            raise UserError(f"{self._directory} holds no {METADATA}; expected the directory of a checkpoint") from error
        except (OSError, ValueError) as error:
            raise self._damaged(f"{METADATA}: {error}") from error

    def _parts_of(self, key: str, entry: Any, places: Mapping[Any, Any]) -> Iterator[_Part]:
        shape, size = tuple(entry.size), entry.properties.dtype.itemsize
        for chunk in entry.chunks:
            place = places[dcp.MetadataIndex(key, chunk.offsets)]
            start, extent = tuple(chunk.offsets), tuple(chunk.sizes)
            inside = len(start) == len(extent) == len(shape) and all(
                begin >= 0 and count >= 0 and begin + count <= bound
                for begin, count, bound in zip(start, extent, shape, strict=True)
            )
            name = place.relative_path
            if not inside or Path(name).name != name or place.offset < 0:
                raise ValueError(f"{key} at {start} does not fit")
            # Every byte of a tensor is in a file: with its length compared with the file when it is read, no made-up
            # shape can ask for more memory than there are bytes.
            if math.prod(extent) * size > place.length:
                raise ValueError(f"{key} at {start} has more elements than bytes")
            yield _Part(start, extent, name, place.offset, place.length)

    def _read_part(self, key: str, part: _Part, target: torch.Tensor) -> None:
        descriptor = self._open(part.file)
        archive = io.BufferedReader(_Slice(descriptor, part.offset, part.length))
        try:
            stored = torch.load(archive, map_location="meta", weights_only=True)
            fits = isinstance(stored, torch.Tensor) and stored.shape == part.shape and stored.dtype == target.dtype
            if not fits:
                raise ValueError(f"it holds {stored if not isinstance(stored, torch.Tensor) else stored.shape}")
            if stored.is_contiguous():
                start, length = _storage_of(descriptor, part)
                skip = stored.storage_offset() * stored.element_size()
                if length < skip + target.nbytes:
                    raise ValueError(f"its data has {length:,} bytes, expected {skip + target.nbytes:,}")
                _fill(descriptor, start + skip, target)
            else:
                archive.seek(0)
                target.copy_(torch.load(archive, map_location="cpu", weights_only=True))
        except MemoryError:
            raise
        except Exception as error:  # torch and zipfile raise many kinds for a damaged archive.
            reason = (str(error).splitlines() or [""])[0]
            raise self._damaged(f"{key} in {part.file}: {type(error).__name__}: {reason}") from error

    def _check_length(self, key: str, part: _Part) -> None:
        """Before memory is asked for that a made-up length would allow."""
        size = os.fstat(self._open(part.file)).st_size
        if part.offset + part.length > size:
            raise self._damaged(
                f"{key} in {part.file}: the file ends at byte {size:,}, expected {part.offset + part.length:,}"
            )

    def _open(self, name: str) -> int:
        if name not in self._files:
            try:
                self._files[name] = os.open(self._directory / name, os.O_RDONLY)
            except OSError as error:
                raise self._damaged(f"{name} cannot be opened ({error.strerror})") from error
        return self._files[name]

    def _damaged(self, reason: str) -> UserError:
        return UserError(f"{self._directory} is damaged ({reason}); use another checkpoint or copy this one again")


def _overlap(part: _Part, start: list[int], shape: list[int]) -> list[tuple[int, int]] | None:
    """The part's share of a region, begin and stop for each dimension; None if there is none."""
    region = [
        (max(own, begin), min(own + size, begin + extent))
        for own, size, begin, extent in zip(part.start, part.shape, start, shape, strict=True)
    ]
    return None if any(begin >= stop for begin, stop in region) else region


def _meet(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> bool:
    return all(begin < stop and start < end for (begin, end), (start, stop) in zip(one, other, strict=True))


def _storage_of(descriptor: int, part: _Part) -> tuple[int, int]:
    """Where in the file the bytes of the archive's only storage begin, and how many there are."""
    with zipfile.ZipFile(io.BufferedReader(_Slice(descriptor, part.offset, part.length))) as archive:
        entries = [entry for entry in archive.infolist() if entry.filename.endswith("/data/0")]
    if len(entries) != 1 or entries[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError("it holds no plain storage")
    header = os.pread(descriptor, _ZIP_HEADER.size, part.offset + entries[0].header_offset)
    magic, name_bytes, extra_bytes = _ZIP_HEADER.unpack(header)
    if magic != _ZIP_MAGIC:
        raise ValueError("its storage has no header")
    start = part.offset + entries[0].header_offset + _ZIP_HEADER.size + name_bytes + extra_bytes
    return start, entries[0].file_size


def _fill(descriptor: int, offset: int, target: torch.Tensor) -> None:
    view = target.view(-1).view(torch.uint8).numpy().data
    while len(view):
        count = os.preadv(descriptor, [view[:_READ_BYTES]], offset)
        if not count:
            raise ValueError(f"the file ends {len(view):,} bytes early")
        view, offset = view[count:], offset + count
