"""Opens .bin/.idx token files through Megatron-Core, after checks that tell a user what is wrong with them."""

import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
_TYPES = {code: numpy.dtype(name) for name, code in _CODES.items()}
# Sequences that are written or checked at a time.
_INDEX_CHUNK = 1 << 18
# Megatron-Core's own limit below which it stores ids in 16 bits.
_UINT16_VOCAB_LIMIT = 65_500
_AGAIN = "make the dataset again with megatron-prealign preprocess"
_MEND = "mend it with megatron-prealign dataset repair if its .bin is whole, or make it again with preprocess"


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


def check_indexed(prefix: str | Path) -> "Index":
    """The checks of `open_indexed` alone: all of the index, streamed, and the size of the tokens.

    Returns:
        The index, mapped.

    Raises:
        UserError: as in `open_indexed`.
    """
    index = load_index(idx_path(prefix), str(prefix))
    if index.sequences == 0:
        raise UserError(f"{index.path}: holds no documents; {_AGAIN}")
    if index.tokens == 0:
        raise UserError(f"{index.path}: its {index.sequences:,} documents hold no tokens; {_AGAIN}")
    check_token_bytes(bin_path(prefix), index)
    return index


@dataclass(frozen=True, eq=False)
class Index:
    """An .idx file, mapped."""

    path: Path
    dtype: numpy.dtype
    """Type of the tokens."""
    lengths: numpy.ndarray
    """Tokens of each sequence, int32 [sequences]."""
    pointers: numpy.ndarray
    """Byte in the .bin at which each sequence starts, int64 [sequences]."""
    boundaries: numpy.ndarray
    """The sequence at which each document starts and, last, the number of sequences, int64 [documents + 1]."""
    modes: bool
    """Whether it is of a multimodal dataset, which has one more byte a sequence."""

    @property
    def sequences(self) -> int:
        return len(self.lengths)

    @property
    def documents(self) -> int:
        return len(self.boundaries) - 1

    @property
    def tokens(self) -> int:
        return self.token_bytes // self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Size of the .bin that belongs to it."""
        if self.sequences == 0:
            return 0
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize


def load_index(path: Path, prefix: str = "") -> Index:
    """Maps an .idx file after checking all of it, in pieces: whatever opens is right in itself. It may be empty.

    Args:
        path: the file.
        prefix: what the user gave, for the message about a missing file.

    Raises:
        UserError: the file is missing, truncated or damaged.
    """
    _check_is_file(path, prefix)
    sequences, boundaries, dtype = _read_header(path)
    expected = index_bytes(sequences, boundaries)
    found = path.stat().st_size
    # Multimodal datasets carry one more byte a sequence.
    if found not in (expected, expected + sequences):
        raise UserError(f"{path}: {found:,} bytes, expected {expected:,} for {sequences:,} documents; {_MEND}")
    index = Index(
        path,
        dtype,
        _map(path, "<i4", _HEADER.size, sequences),
        _map(path, "<i8", _HEADER.size + 4 * sequences, sequences),
        _map(path, "<i8", _HEADER.size + 12 * sequences, boundaries),
        found != expected,
    )
    _check_boundaries(index)
    _check_pointers(index)
    return index


def index_dtype(path: Path) -> numpy.dtype:
    """The type of the tokens as the header alone says.

    Raises:
        UserError: it is no header.
    """
    return _read_header(path)[2]


def _map(path: Path, dtype: str, offset: int, count: int) -> numpy.ndarray:
    if count == 0:
        # An empty range cannot be mapped.
        return numpy.empty(0, dtype)
    # A plain view: indexing through numpy's memmap class is several times slower.
    return numpy.asarray(numpy.memmap(path, numpy.dtype(dtype), "r", offset, (count,)))


def _check_is_file(path: Path, prefix: str) -> None:
    if path.is_file():
        return
    if path.is_symlink():
        raise UserError(f"{path}: a link that leads to no file ({os.readlink(path)}); mend the link")
    hint = _MEND if path.suffix == ".idx" and bin_path(prefix).is_file() else _AGAIN
    if prefix.endswith((".bin", ".idx", ".json")) or "*" in prefix:
        hint = "give the prefix without the ending, and patterns unquoted, for the shell"
    raise UserError(f"{path}: no such file; {hint}")


def _check_boundaries(index: Index) -> None:
    boundaries = index.boundaries
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != index.sequences:
        raise UserError(
            f"{index.path}: its document boundaries do not cover its {index.sequences:,} sequences; {_MEND}"
        )
    for start in range(0, len(boundaries), _INDEX_CHUNK):
        part = boundaries[start : start + _INDEX_CHUNK + 1]
        if (part[1:] < part[:-1]).any():
            raise UserError(f"{index.path}: damaged (its document boundaries go backwards); {_MEND}")


def _check_pointers(index: Index) -> None:
    expected = 0
    for start in range(0, index.sequences, _INDEX_CHUNK):
        lengths = index.lengths[start : start + _INDEX_CHUNK]
        pointers = index.pointers[start : start + _INDEX_CHUNK]
        if lengths.min() < 0 or (start == 0 and pointers[0] != 0):
            raise UserError(f"{index.path}: damaged (a negative length, or the first document is not at 0); {_MEND}")
        sizes = lengths.astype(numpy.int64) * index.dtype.itemsize
        ends = numpy.cumsum(sizes) + expected
        if (pointers != ends - sizes).any():
            raise UserError(f"{index.path}: damaged (its lengths and offsets do not fit together); {_MEND}")
        expected = int(ends[-1])


def check_token_bytes(path: Path, index: Index) -> None:
    """Checks that a .bin file is there and as large as its index says.

    Raises:
        UserError: it is not.
    """
    _check_is_file(path, "")
    found = path.stat().st_size
    if found != index.token_bytes:
        raise UserError(f"{path}: {found:,} bytes, expected {index.token_bytes:,} as {index.path.name} says; {_AGAIN}")


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
    sequences = len(lengths)
    if documents is not None and (len(documents) == 0 or documents[0] != 0 or documents[-1] != sequences):
        raise ValueError(f"the document boundaries do not go from 0 to {sequences}, the number of sequences")
    if documents is None:
        chunks = (numpy.arange(start, min(start + _INDEX_CHUNK, sequences + 1)) for start in _chunks(sequences + 1))
        _write(path, dtype, [lengths], sequences + 1, chunks)
    else:
        chunks = (documents[start : start + _INDEX_CHUNK] for start in _chunks(len(documents)))
        _write(path, dtype, [lengths], len(documents), chunks)


def write_joined_index(path: Path, indexes: "Sequence[Index]") -> None:
    """Writes the index of a .bin file that holds those of several others one behind the other, as `write_index` does.

    Args:
        path: the file.
        indexes: theirs, of one dtype, at least one.
    """

    def boundaries() -> Iterator[numpy.ndarray]:
        yield numpy.zeros(1, dtype=numpy.int64)
        first = 0
        for index in indexes:
            rest = index.boundaries[1:]
            for start in _chunks(len(rest)):
                yield rest[start : start + _INDEX_CHUNK] + first
            first += index.sequences

    count = sum(index.documents for index in indexes) + 1
    _write(path, indexes[0].dtype, [index.lengths for index in indexes], count, boundaries())


def _chunks(count: int) -> range:
    return range(0, count, _INDEX_CHUNK)


def _write(
    path: Path,
    dtype: type | numpy.dtype,
    lengths: Sequence[numpy.ndarray],
    boundaries: int,
    documents: Iterable[numpy.ndarray],
) -> None:
    """`lengths` one behind the other; `documents` gives the `boundaries` numbers in pieces."""
    code = _CODES.get(numpy.dtype(dtype).name)
    if code is None:
        raise ValueError(f"dtype {numpy.dtype(dtype).name} has no code in an .idx file; expected one of {list(_CODES)}")
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, sum(map(len, lengths)), boundaries))
        for part in lengths:
            for start in _chunks(len(part)):
                stream.write(part[start : start + _INDEX_CHUNK].astype("<i4").tobytes())
        pointer = 0
        for part in lengths:
            for start in _chunks(len(part)):
                sizes = part[start : start + _INDEX_CHUNK].astype("<i8") * _TYPES[code].itemsize
                ends = numpy.cumsum(sizes) + pointer
                stream.write((ends - sizes).astype("<i8").tobytes())
                pointer = int(ends[-1])
        for numbers in documents:
            stream.write(numbers.astype("<i8").tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def _read_header(path: Path) -> tuple[int, int, numpy.dtype]:
    """(sequences, document boundaries, type of the tokens)."""
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{path}: not a Megatron index file (it starts with {header[:9]!r}); {_MEND}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _TYPES:
        raise UserError(f"{path}: version {version}, dtype code {code}; expected version 1, codes 1 to 8; {_AGAIN}")
    return sequences, boundaries, _TYPES[code]
