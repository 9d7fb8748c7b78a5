"""The header of a safetensors file, read without trusting it: every size is bounded before anything is allocated, every
offset is checked before anything is read by it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The format's own limit.
_MOST_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


class HeaderError(ValueError):
    """A header is damaged; the text says how."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and what it is, by its file."""

    file: Path
    dtype: str
    """The name that safetensors has for it, such as BF16."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file; -1 in a pickle, which has no such place."""
    bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> place of each tensor of a safetensors file.

    Memory: the header, at most 100 MB, whatever the file says.

    Raises:
        HeaderError: it is no safetensors file, or a damaged one; also when tensors overlap, leave gaps or do not fill
            the file, or a name is there twice.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
            raise HeaderError(f"its header has {length:,} bytes and the file {size:,}: no safetensors file, or cut off")
        text = stream.read(length)
    header = parse_json(text, unique=True)
    if not isinstance(header, dict):
        raise HeaderError(f"its header holds a {type(header).__name__}, expected an object")
    data_start = _LENGTH_BYTES + length
    tensors = {
        name: _stored_tensor(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"
    }
    _check_places(tensors, data_start, size)
    return tensors


def parse_json(text: bytes, *, unique: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        unique: refuse objects that have a name twice, of which one would silently win.

    Raises:
        HeaderError: it is no JSON.
    """

    def only_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise HeaderError(f"{shown(twice)} is there twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=only_once if unique else None)
    except HeaderError:
        raise
    except RecursionError as error:
        raise HeaderError("it is not JSON (nested too deeply)") from error
    except ValueError as error:
        raise HeaderError(f"it is not JSON ({error})") from error


def shown(name: str) -> str:
    """A name out of a file, fit for a line of a message."""
    name = name if len(name) <= 100 else f"{name[:100]}..."
    return name if name.isprintable() and name else repr(name)


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise HeaderError(f"the entry of {shown(name)} is no object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise HeaderError(f"{shown(name)} has dtype {shown(str(dtype))}, expected one of {', '.join(_ITEM_BITS)}")
    if not _is_counts(shape):
        raise HeaderError(f"the shape of {shown(name)} is no list of numbers from 0")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"the data_offsets of {shown(name)} are not its begin and its end")
    begin, end = offsets
    bits = math.prod(shape) * _ITEM_BITS[dtype]
    if bits != 8 * (end - begin):
        raise HeaderError(
            f"{shown(name)} has {end - begin:,} bytes, expected {-(-bits // 8):,} for {dtype} {shown(str(shape))}"
        )
    return StoredTensor(file, dtype, tuple(shape), data_start + begin, end - begin)


def _is_counts(value: Any) -> bool:
    # Larger numbers than a file can have bytes would only slow the arithmetic down, or not print.
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(each) is int and 0 <= each < 2**63 for each in value)
    )


def _check_places(tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    """Bytes that belong to two tensors or to none would be a second meaning of the same file."""
    reached = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.offset != reached:
            raise HeaderError(
                f"{shown(name)} begins at byte {tensor.offset:,} of the file, expected {reached:,}, where the one "
                "before it ends"
            )
        reached += tensor.bytes
    if reached != size:
        raise HeaderError(
            f"its tensors end at byte {reached:,} and the file has {size:,}: cut off, or written to since"
        )
