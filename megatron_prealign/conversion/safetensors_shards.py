"""Writes safetensors files one tensor at a time, sharded by size, with the index that transformers reads.

The library `safetensors` needs all tensors of a file in memory. The format is a header with each tensor's offsets,
followed by the tensors; since all shapes are known in advance, the header is written first.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Linux writes at most this much in one call.
_WRITE_BYTES = 0x7FFF_F000


@dataclass
class _File:
    """One file to write: its tensors in order, and their offsets after the header."""

    name: str = ""
    offsets: dict[str, tuple[int, int]] = field(default_factory=dict)
    bytes: int = 0


class SafetensorsWriter:
    """Writes the tensors of a model, added in the order of `shapes`. A background thread writes one tensor while the
    caller reads the next.

    Args:
        directory: An existing directory.
        shapes: Name -> shape of every tensor.
        dtype: Dtype of all tensors: float32, bfloat16 or float16.
        shard_bytes: Maximum bytes of tensors per file; a larger tensor gets its own file.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
    ) -> None:
        self._directory, self._shapes, self._dtype = directory, dict(shapes), dtype
        self.files = _plan(shapes, dtype.itemsize, shard_bytes)
        self._order = [(file, name) for file in self.files for name in file.offsets]
        self._next = 0
        self._descriptor: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="safetensors")
        self._pending: Future[None] | None = None

    @property
    def total_bytes(self) -> int:
        """Total size of all tensors."""
        return sum(file.bytes for file in self.files)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Writes the next tensor in the background; it must not be modified afterwards.

        Raises:
            ValueError: not the next tensor, or not of the expected shape or dtype.
            OSError: writing this tensor or the previous one failed.
        """
        file, expected = self._order[self._next] if self._next < len(self._order) else (None, "no more tensors")
        if file is None or name != expected:
            raise ValueError(f"got {name}, expected {expected}")
        if tuple(tensor.shape) != self._shapes[name] or tensor.dtype != self._dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, expected {self._shapes[name]} {self._dtype}"
            )
        self._wait()
        self._pending = self._thread.submit(self._write, file, name, tensor.contiguous())
        self._next += 1

    def close(self) -> None:
        """Waits for the last tensor and, if there are several files, writes the index.

        Raises:
            ValueError: tensors are missing.
            OSError: writing failed.
        """
        self._wait()
        if self._next < len(self._order):
            raise ValueError(f"{self._order[self._next][1]} and all tensors after it are missing")
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {name: file.name for file in self.files for name in sorted(file.offsets)},
            }
            (self._directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _wait(self) -> None:
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _write(self, file: _File, name: str, tensor: torch.Tensor) -> None:
        if next(iter(file.offsets)) == name:
            self._descriptor = os.open(self._directory / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            _write_all(self._descriptor, memoryview(self._header(file)))
        assert self._descriptor is not None, "opened by the first tensor of the file"
        if tensor.numel():
            _write_all(self._descriptor, tensor.reshape(-1).view(torch.uint8).numpy().data)
        if next(reversed(file.offsets)) == name:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def _header(self, file: _File) -> bytes:
        content: dict[str, object] = {"__metadata__": {"format": "pt"}}
        content |= {
            name: {"dtype": _NAMES[self._dtype], "shape": list(self._shapes[name]), "data_offsets": list(offsets)}
            for name, offsets in file.offsets.items()
        }
        text = json.dumps(content, separators=(",", ":")).encode()
        # Aligns the tensors to eight bytes, so that they can be memory-mapped.
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def _plan(shapes: Mapping[str, tuple[int, ...]], item_bytes: int, shard_bytes: int) -> list[_File]:
    """Assigns the tensors to files, in order."""
    files = [_File()]
    for name, shape in shapes.items():
        size = math.prod(shape) * item_bytes
        if files[-1].offsets and files[-1].bytes + size > shard_bytes:
            files.append(_File())
        last = files[-1]
        last.offsets[name] = (last.bytes, last.bytes + size)
        last.bytes += size
    for number, file in enumerate(files, start=1):
        file.name = SINGLE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
    return files


def _write_all(descriptor: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(descriptor, data[:_WRITE_BYTES]) :]
