"""Reads the header of an untrusted safetensors file: sizes are bounded before anything is allocated, and offsets are
checked before they are used."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
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
    """A header is corrupt; the message says how."""


@dataclass(frozen=True)
class StoredTensor:
    """Location and metadata of a tensor in a file."""

    file: Path
    dtype: str
    """Name of the dtype in safetensors, such as BF16."""
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file; -1 in a pickle, where it is unknown."""
    bytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Name -> location and metadata of each tensor of a safetensors file.

    Memory: the header, at most 100 MB, whatever size the file declares.

    Raises:
        HeaderError: not a safetensors file, or a corrupt one; also if tensors overlap, leave gaps or do not fill the
            file, or a name appears twice.
        OSError: the file cannot be read.
    """
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise HeaderError(f"header has {length:,} bytes, file has {size:,}: not a safetensors file, or truncated")
        text = stream.read(length)
    header = parse_json(text, unique=True)
    if not isinstance(header, dict):
        raise HeaderError(f"header is a {type(header).__name__}, expected an object")
    data_start = _LENGTH_BYTES + length
    tensors = {
        name: _stored_tensor(file, name, entry, data_start) for name, entry in header.items() if name != "__metadata__"
    }
    _check_offsets(tensors, data_start, size)
    return tensors


def parse_json(text: bytes, *, unique: bool = False) -> Any:
    """Parses a JSON text.

    Args:
        unique: Refuse objects with duplicate names, of which the last would silently win.

    Raises:
        HeaderError: not valid JSON.
    """

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise HeaderError(f"{quoted(duplicate)} appears twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=refuse_duplicates if unique else None)
    except HeaderError:
        raise
    except RecursionError as error:
        raise HeaderError("not valid JSON (nested too deeply)") from error
    except ValueError as error:
        raise HeaderError(f"not valid JSON ({error})") from error


def quoted(name: str) -> str:
    """A name from a file, shortened and escaped for a one-line message."""
    name = name if len(name) <= 100 else f"{name[:100]}..."
    return name if name.isprintable() and name else repr(name)


def _stored_tensor(file: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, Mapping) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise HeaderError(f"entry of {quoted(name)} is not an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        raise HeaderError(f"{quoted(name)} has dtype {quoted(str(dtype))}, expected one of {', '.join(_ITEM_BITS)}")
    if not _is_counts(shape):
        raise HeaderError(f"shape of {quoted(name)} is not a list of non-negative integers")
    if not _is_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"data_offsets of {quoted(name)} are not [begin, end]")
    begin, end = offsets
    bits = math.prod(shape) * _ITEM_BITS[dtype]
    if bits != 8 * (end - begin):
        raise HeaderError(
            f"{quoted(name)} has {end - begin:,} bytes, expected {-(-bits // 8):,} for {dtype} {quoted(str(shape))}"
        )
    return StoredTensor(file, dtype, tuple(shape), data_start + begin, end - begin)


def _is_counts(value: Any) -> bool:
    # Numbers larger than any file size would only slow down the arithmetic, or fail to print.
    return (
        isinstance(value, list) and len(value) <= 64 and all(type(each) is int and 0 <= each < 2**63 for each in value)
    )


def _check_offsets(tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    """Checks that every byte belongs to exactly one tensor; otherwise the same file could be read in two ways."""
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if tensor.offset != end:
            raise HeaderError(
                f"{quoted(name)} starts at byte {tensor.offset:,} of the file, expected {end:,}, where the previous "
                "one "
                "ends"
            )
        end += tensor.bytes
    if end != size:
        raise HeaderError(f"tensors end at byte {end:,}, file has {size:,} bytes: truncated or modified")
