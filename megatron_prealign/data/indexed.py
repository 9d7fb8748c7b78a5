"""Reads and writes .bin/.idx token files in Megatron-Core's format, with checks that report what is wrong."""

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
# Megatron-Core's dtype codes.
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
_DTYPES = {code: numpy.dtype(name) for name, code in _CODES.items()}
# Number of sequences written or checked at a time.
_INDEX_CHUNK = 1 << 18
# Megatron-Core stores ids of vocabularies below this size in 16 bits.
_UINT16_VOCAB_LIMIT = 65_500
_AGAIN = "recreate the dataset with megatron-prealign preprocess"
_REPAIR = "run megatron-prealign dataset repair if its .bin is intact, or recreate the dataset with preprocess"


def token_dtype(vocab_size: int) -> type[numpy.uint16] | type[numpy.int32]:
    """Returns the dtype in which token ids of a vocabulary are stored."""
    return numpy.uint16 if vocab_size < _UINT16_VOCAB_LIMIT else numpy.int32


def bin_path(prefix: str | Path) -> Path:
    """`PREFIX.bin`, the file of tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """`PREFIX.idx`, the index of sequences and documents."""
    return Path(f"{prefix}.idx")


def open_indexed(prefix: str | Path) -> "IndexedDataset":
    """Opens a dataset written by `preprocess` or by Megatron's own tools.

    Its items are views of a memory map that Megatron-Core closes with the dataset. Keep a reference to the dataset:
    reading an item after the dataset is gone (`open_indexed(prefix)[0].tolist()`) is a segmentation fault.

    Args:
        prefix: Path without extension.

    Raises:
        UserError: A file is missing, the header is invalid, or the files are truncated or do not belong together.
    """
    check_indexed(prefix)
    return import_indexed_dataset().IndexedDataset(str(prefix))


def import_indexed_dataset() -> Any:
    """Imports `megatron.core.datasets.indexed_dataset` without the warnings that the import emits on a CPU.

    The first call imports torch, which takes seconds.
    """
    with warnings.catch_warnings():
        # Emitted by each optimizer module; irrelevant to token files.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def check_indexed(prefix: str | Path) -> "Index":
    """Runs the checks of `open_indexed` without opening the dataset: the complete index, streamed, and the .bin size.

    Returns:
        The index, memory-mapped.

    Raises:
        UserError: As in `open_indexed`.
    """
    index = load_index(idx_path(prefix), str(prefix))
    if index.sequences == 0:
        raise UserError(f"{index.path}: contains no documents; {_AGAIN}")
    if index.tokens == 0:
        raise UserError(f"{index.path}: contains {index.sequences:,} documents but no tokens; {_AGAIN}")
    check_token_bytes(bin_path(prefix), index)
    return index


@dataclass(frozen=True, eq=False)
class Index:
    """A memory-mapped .idx file."""

    path: Path
    dtype: numpy.dtype
    """Token dtype."""
    lengths: numpy.ndarray
    """Number of tokens of each sequence, int32 [sequences]."""
    pointers: numpy.ndarray
    """Byte offset of each sequence in the .bin, int64 [sequences]."""
    boundaries: numpy.ndarray
    """First sequence of each document, followed by the number of sequences, int64 [documents + 1]."""
    multimodal: bool
    """Whether it belongs to a multimodal dataset, whose index has one more byte per sequence."""

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
        """Size of the matching .bin in bytes."""
        if self.sequences == 0:
            return 0
        return int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize


def load_index(path: Path, prefix: str = "") -> Index:
    """Memory-maps an .idx file after checking all of it in chunks: the returned index is consistent. It may be empty.

    Args:
        path: The file.
        prefix: Prefix named by the user, for the message about a missing file.

    Raises:
        UserError: The file is missing, truncated or corrupt.
    """
    _check_is_file(path, prefix)
    sequences, boundaries, dtype = _read_header(path)
    expected = index_bytes(sequences, boundaries)
    size = path.stat().st_size
    # Multimodal datasets have one more byte per sequence.
    if size not in (expected, expected + sequences):
        raise UserError(f"{path}: got {size:,} bytes, expected {expected:,} for {sequences:,} documents; {_REPAIR}")
    index = Index(
        path,
        dtype,
        _map(path, "<i4", _HEADER.size, sequences),
        _map(path, "<i8", _HEADER.size + 4 * sequences, sequences),
        _map(path, "<i8", _HEADER.size + 12 * sequences, boundaries),
        size != expected,
    )
    _check_boundaries(index)
    _check_pointers(index)
    return index


def index_dtype(path: Path) -> numpy.dtype:
    """Reads the token dtype from the header.

    Raises:
        UserError: The header is invalid.
    """
    return _read_header(path)[2]


def _map(path: Path, dtype: str, offset: int, count: int) -> numpy.ndarray:
    if count == 0:
        # An empty range cannot be memory-mapped.
        return numpy.empty(0, dtype)
    # A plain ndarray view: indexing np.memmap is several times slower.
    return numpy.asarray(numpy.memmap(path, numpy.dtype(dtype), "r", offset, (count,)))


def _check_is_file(path: Path, prefix: str) -> None:
    if path.is_file():
        return
    if path.is_symlink():
        raise UserError(f"{path}: broken symbolic link to {os.readlink(path)}; fix the link")
    hint = "check the path, or create the dataset with megatron-prealign preprocess"
    if path.suffix == ".idx" and bin_path(prefix).is_file():
        hint = _REPAIR
    if prefix.endswith((".bin", ".idx", ".json")) or "*" in prefix:
        hint = "pass the prefix without extension; do not quote patterns, so that the shell expands them"
    raise UserError(f"{path}: file not found; {hint}")


def _check_boundaries(index: Index) -> None:
    boundaries = index.boundaries
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != index.sequences:
        raise UserError(
            f"{index.path}: corrupt (document boundaries do not cover its {index.sequences:,} sequences); {_REPAIR}"
        )
    for start in range(0, len(boundaries), _INDEX_CHUNK):
        part = boundaries[start : start + _INDEX_CHUNK + 1]
        if (part[1:] < part[:-1]).any():
            raise UserError(f"{index.path}: corrupt (document boundaries decrease); {_REPAIR}")


def _check_pointers(index: Index) -> None:
    expected = 0
    for start in range(0, index.sequences, _INDEX_CHUNK):
        lengths = index.lengths[start : start + _INDEX_CHUNK]
        pointers = index.pointers[start : start + _INDEX_CHUNK]
        if lengths.min() < 0 or (start == 0 and pointers[0] != 0):
            raise UserError(f"{index.path}: corrupt (negative length, or first document not at offset 0); {_REPAIR}")
        sizes = lengths.astype(numpy.int64) * index.dtype.itemsize
        ends = numpy.cumsum(sizes) + expected
        if (pointers != ends - sizes).any():
            raise UserError(f"{index.path}: corrupt (sequence lengths and offsets do not match); {_REPAIR}")
        expected = int(ends[-1])


def check_token_bytes(path: Path, index: Index) -> None:
    """Checks that a .bin file exists and has the size that its index implies.

    Raises:
        UserError: It is missing or has another size.
    """
    _check_is_file(path, "")
    size = path.stat().st_size
    if size != index.token_bytes:
        raise UserError(f"{path}: got {size:,} bytes, expected {index.token_bytes:,} from {index.path.name}; {_AGAIN}")


def index_bytes(sequences: int, boundaries: int) -> int:
    """Size of an .idx file with this number of sequences and document boundaries (documents + 1)."""
    return _HEADER.size + 12 * sequences + 8 * boundaries


def write_index(path: Path, dtype: type, lengths: numpy.ndarray, documents: numpy.ndarray | None = None) -> None:
    """Writes an .idx file, byte-identical to Megatron-Core's builder, directly to `path` and syncs it.

    Needs a few MiB of memory in addition to the arrays. For an atomic write, pass a temporary path and rename it.

    Args:
        path: The file.
        dtype: Token dtype.
        lengths: Number of tokens of each sequence, int32 [sequences]; may be a memory map.
        documents: First sequence of each document, followed by the number of sequences, int64 [documents + 1]; None if
            every sequence is a document.

    Raises:
        ValueError: The format does not support `dtype`, or `documents` does not run from 0 to the number of sequences.
    """
    sequences = len(lengths)
    if documents is not None and (len(documents) == 0 or documents[0] != 0 or documents[-1] != sequences):
        raise ValueError(f"document boundaries must run from 0 to {sequences}, the number of sequences")
    if documents is None:
        chunks = (numpy.arange(start, min(start + _INDEX_CHUNK, sequences + 1)) for start in _chunks(sequences + 1))
        _write(path, dtype, [lengths], sequences + 1, chunks)
    else:
        chunks = (documents[start : start + _INDEX_CHUNK] for start in _chunks(len(documents)))
        _write(path, dtype, [lengths], len(documents), chunks)


def write_merged_index(path: Path, indexes: "Sequence[Index]") -> None:
    """Writes the index of several concatenated .bin files, as `write_index` does.

    Args:
        path: The file.
        indexes: Indexes of the .bin files, in order; at least one, all with the same dtype.
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
    """Writes the concatenated `lengths`; `documents` yields the `boundaries` document boundaries in chunks."""
    code = _CODES.get(numpy.dtype(dtype).name)
    if code is None:
        raise ValueError(f"unsupported dtype {numpy.dtype(dtype).name} in an .idx file; expected one of {list(_CODES)}")
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, sum(map(len, lengths)), boundaries))
        for part in lengths:
            for start in _chunks(len(part)):
                stream.write(part[start : start + _INDEX_CHUNK].astype("<i4").tobytes())
        pointer = 0
        for part in lengths:
            for start in _chunks(len(part)):
                sizes = part[start : start + _INDEX_CHUNK].astype("<i8") * _DTYPES[code].itemsize
                ends = numpy.cumsum(sizes) + pointer
                stream.write((ends - sizes).astype("<i8").tobytes())
                pointer = int(ends[-1])
        for part in documents:
            stream.write(part.astype("<i8").tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def _read_header(path: Path) -> tuple[int, int, numpy.dtype]:
    """Returns (number of sequences, number of document boundaries, token dtype)."""
    with path.open("rb") as stream:
        header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise UserError(f"{path}: not a Megatron index file (it starts with {header[:9]!r}); {_REPAIR}")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise UserError(f"{path}: version {version}, dtype code {code}; expected version 1, codes 1 to 8; {_AGAIN}")
    return sequences, boundaries, _DTYPES[code]
