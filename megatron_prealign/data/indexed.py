"""Opens .bin/.idx token files through Megatron-Core, after checks that tell a user what is wrong with them."""

import os
import struct
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

_MAGIC = b"MMIDIDX\x00\x00"
# Magic, version, dtype code, number of sequences, number of document boundaries; little endian, not padded.
_HEADER = struct.Struct("<9sQBQQ")
# Megatron-Core's own numbers of the types.
_CODES = {
    "uint8": 1,
    "int8": 2,
    "int16": 3,
    "int32": 4,
    "int64": 5,
    "float64": 6,
    "float32": 7,
    "uint16": 8,
}
_ITEM_BYTES = {code: numpy.dtype(name).itemsize for name, code in _CODES.items()}
# Sequences that are written at a time.
_INDEX_CHUNK = 1 << 18
# Megatron-Core's own limit below which it stores ids in 16 bits.
_UINT16_VOCAB_LIMIT = 65_500
_AGAIN = "make the dataset again with megatron-prealign preprocess"


def token_dtype(vocab_size: int) -> type[numpy.uint16] | type[numpy.int32]:
    """The type in which ids of a vocabulary are stored."""
    return numpy.uint16 if vocab_size < _UINT16_VOCAB_LIMIT else numpy.int32


def bin_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`, the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`, where each document lies."""
    return Path(f"{prefix}.idx")


def open_indexed(prefix: str | Path) -> "IndexedDataset":
    """Opens a dataset written by `preprocess` or by Megatron's own tools.

    Its rows are views of a memory map that Megatron-Core closes together with the dataset: reading a row of a dataset
    that is gone (`open_indexed(prefix)[0].tolist()`) ends the process by a segmentation fault. Keep the dataset.

    Args:
        prefix: path without ending.

    Raises:
        UserError: a file is missing, the header is wrong, or the files are truncated or do not belong together.
    """
    check_indexed(prefix)
    return import_indexed_dataset().IndexedDataset(str(prefix))


def import_indexed_dataset() -> Any:
    """The module `megatron.core.datasets.indexed_dataset`, without the warnings that its import gives on a CPU.

    It imports torch and takes seconds the first time.
    """
    with warnings.catch_warnings():
        # Said once per file of the optimizer, which token files have no use for.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def check_indexed(prefix: str | Path) -> None:
    """The checks of `open_indexed` alone. Reads the header and a few numbers of the index, not the tokens.

    Raises:
        UserError: as in `open_indexed`.
    """
    tokens, index = bin_path(prefix), idx_path(prefix)
    for path in (index, tokens):
        if not path.is_file():
            hint = "give the prefix without the ending" if str(prefix).endswith((".bin", ".idx", ".json")) else _AGAIN
            raise UserError(f"{path}: no such file; {hint}")
    sequences, boundaries, item_bytes = _read_header(index)
    expected = index_bytes(sequences, boundaries)
    found = index.stat().st_size
    # Multimodal datasets carry one more byte a sequence.
    if found not in (expected, expected + sequences):
        raise UserError(f"{index}: {found:,} bytes, expected {expected:,} for {sequences:,} documents; {_AGAIN}")
    if sequences == 0:
        raise UserError(f"{index}: holds no documents; {_AGAIN}")
    lengths = numpy.memmap(index, numpy.dtype("<i4"), "r", _HEADER.size, (sequences,))
    pointers = numpy.memmap(index, numpy.dtype("<i8"), "r", _HEADER.size + 4 * sequences, (sequences,))
    documents = numpy.memmap(index, numpy.dtype("<i8"), "r", _HEADER.size + 12 * sequences, (boundaries,))
    if boundaries == 0 or documents[0] != 0 or documents[-1] != sequences:
        raise UserError(f"{index}: its document boundaries do not cover its {sequences:,} sequences; {_AGAIN}")
    if int(lengths.min()) < 0 or int(pointers[0]) != 0:
        raise UserError(f"{index}: damaged (a negative length, or the first document is not at 0); {_AGAIN}")
    expected = int(pointers[-1]) + int(lengths[-1]) * item_bytes
    found = tokens.stat().st_size
    if int(lengths.sum(dtype=numpy.int64)) * item_bytes != expected:
        raise UserError(f"{index}: damaged (its lengths and offsets do not fit together); {_AGAIN}")
    if found != expected:
        raise UserError(f"{tokens}: {found:,} bytes, expected {expected:,} as {index.name} says; {_AGAIN}")


def index_bytes(sequences: int, boundaries: int) -> int:
    """The size of an .idx file with so many sequences and document boundaries (documents + 1)."""
    return _HEADER.size + 12 * sequences + 8 * boundaries


def write_index(path: Path, dtype: type, lengths: numpy.ndarray, documents: numpy.ndarray | None = None) -> None:
    """Writes an .idx file to exactly `path`, with the bytes that Megatron-Core's builder writes, and syncs it.

    Besides the arrays it needs a few MiB of memory. For a file that must appear whole or not at all, give a temporary
    path and rename it.

    Args:
        path: the file.
        dtype: numpy type of the tokens.
        lengths: tokens of each sequence, int32 [sequences]; may be a memory map.
        documents: the sequence at which each document starts and, last, the number of sequences, int64 [documents + 1];
            None if every sequence is a document.

    Raises:
        ValueError: a dtype that the format does not have, or `documents` does not go from 0 to the number of sequences.
    """
    code = _CODES.get(numpy.dtype(dtype).name)
    if code is None:
        raise ValueError(f"dtype {numpy.dtype(dtype).name} has no code in an .idx file; expected one of {list(_CODES)}")
    sequences = len(lengths)
    boundaries = sequences + 1 if documents is None else len(documents)
    if documents is not None and (boundaries == 0 or documents[0] != 0 or documents[-1] != sequences):
        raise ValueError(f"the document boundaries do not go from 0 to {sequences}, the number of sequences")
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, sequences, boundaries))
        for start in range(0, sequences, _INDEX_CHUNK):
            stream.write(lengths[start : start + _INDEX_CHUNK].astype("<i4").tobytes())
        pointer = 0
        for start in range(0, sequences, _INDEX_CHUNK):
            sizes = lengths[start : start + _INDEX_CHUNK].astype("<i8") * _ITEM_BYTES[code]
            ends = numpy.cumsum(sizes) + pointer
            stream.write((ends - sizes).astype("<i8").tobytes())
            pointer = int(ends[-1])
        for start in range(0, boundaries, _INDEX_CHUNK):
            stop = min(start + _INDEX_CHUNK, boundaries)
            part = numpy.arange(start, stop) if documents is None else documents[start:stop]
            stream.write(part.astype("<i8").tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def _read_header(path: Path) -> tuple[int, int, int]:
    """(sequences, document boundaries, bytes per token)."""
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{path}: not a Megatron index file (it starts with {header[:9]!r}); {_AGAIN}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _ITEM_BYTES:
        raise UserError(f"{path}: version {version}, dtype code {code}; expected version 1, codes 1 to 8; {_AGAIN}")
    return sequences, boundaries, _ITEM_BYTES[code]
