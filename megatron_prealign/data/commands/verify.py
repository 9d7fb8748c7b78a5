"""Reads a complete dataset and lists all problems."""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_prealign.data.dataset import check_workers, sidecar_mismatches, token_positions
from megatron_prealign.data.indexed import Index, bin_path, check_token_bytes, idx_path, load_index
from megatron_prealign.data.sidecar import Sidecar, load_sidecar, sidecar_path
from megatron_prealign.data.word_bitmap import check_words, words_path
from megatron_prealign.errors import UserError
from megatron_prealign.files.checksum import CHECKSUM_BLOCK, checksum_of_blocks, file_checksum
from megatron_prealign.files.threads import stoppable_threads
from megatron_prealign.progress import Progress
from megatron_prealign.text import plural

_READ_BYTES = 4 * 1024 * 1024
# Number of documents checked at a time.
_CHUNK = 1 << 18
_AGAIN = "recreate the dataset with megatron-prealign preprocess"

T = TypeVar("T")


@dataclass
class VerifyResult:
    """Problems of a dataset and what was checked."""

    prefix: str
    problems: list[str] = field(default_factory=list)
    """One line per problem; empty if there are none."""
    checked: list[str] = field(default_factory=list)
    """Human-readable names of the checks."""


def verify(prefix: str, *, workers: int = 1, tokenizer: str | None = None, show_progress: bool = True) -> VerifyResult:
    """Checks the index, every id, the end of every document, checksums, the word bitmap and the counts of the sidecar.

    Every byte is read once.

    Args:
        prefix: Path without extension.
        workers: Number of threads that read and check. Memory: about 40 MiB each.
        tokenizer: Tokenizer to compare with the sidecar.
        show_progress: Whether to write a progress bar to standard error.

    Raises:
        UserError: An option is invalid or the tokenizer cannot be loaded. Problems of the dataset are returned instead.
    """
    check_workers(workers)
    result = VerifyResult(prefix)
    sidecar = _try(result, lambda: load_sidecar(prefix))
    if sidecar is not None and tokenizer is not None:
        _check_tokenizer(result, sidecar, tokenizer)
    index = _try(result, lambda: load_index(idx_path(prefix), prefix))
    if index is not None:
        result.checked.append(f"index of {plural(index.documents, 'document')}")
        if index.tokens == 0 and (sidecar is None or sidecar.shard is None):
            result.problems.append(f"{index.path}: contains no tokens; {_AGAIN}")
        if sidecar is not None:
            result.problems += sidecar_mismatches(prefix, index, sidecar)
    _check_tokens(result, index, sidecar, workers, show_progress)
    if sidecar is not None:
        _check_checksum(result, idx_path(prefix), sidecar, "idx", lambda path: file_checksum(path, workers))
        if sidecar.segmenter is not None and index is not None:
            _check_bitmap(result, index, sidecar, workers)
        if not sidecar.checksums:
            result.checked.append("no checksums, since the sidecar has none (dataset repair adds them)")
    return result


def _try(result: VerifyResult, check: Callable[[], T]) -> T | None:
    """Returns the result of `check`; if it raises, adds the error to the problems and returns None."""
    try:
        return check()
    except UserError as error:
        result.problems.append(str(error))
    except OSError as error:
        result.problems.append(f"cannot read {error.filename or result.prefix}: {error.strerror}")
    return None


def _passes(result: VerifyResult, check: Callable[[], object]) -> bool:
    return _try(result, lambda: (check(),)) is not None


def _check_tokenizer(result: VerifyResult, sidecar: Sidecar, path: str) -> None:
    from megatron_prealign.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(path)
    result.checked.append(f"tokenizer {path}")
    for name, got, expected in (
        ("tokenizer.fingerprint", sidecar.tokenizer.fingerprint, tokenizer.fingerprint),
        ("tokenizer.vocab_size", sidecar.tokenizer.vocab_size, tokenizer.vocab_size),
        ("eod_id", sidecar.eod_id, tokenizer.eod_id),
    ):
        if got != expected:
            result.problems.append(
                f"{sidecar_path(result.prefix)}: {name} is {got}, but tokenizer {path} has {expected}; pass the "
                "tokenizer that made the dataset, or preprocess again with this one"
            )


def _check_checksum(
    result: VerifyResult, path: Path, sidecar: Sidecar, name: str, compute: Callable[[Path], str | None]
) -> None:
    expected = sidecar.checksums.get(name)
    if expected is None or not path.is_file():
        # A missing file is reported by the code that opens it.
        return
    checksum = _try(result, lambda: compute(path))
    if checksum is None:
        return
    result.checked.append(f"checksum of .{name}")
    if checksum != expected:
        result.problems.append(
            f"{path}: checksum is {checksum}, expected {expected} from the sidecar; the content has changed, "
            "copy the file again or recreate the dataset"
        )


@dataclass
class _TokenStats:
    """Statistics of a range of tokens."""

    digest: bytes = b""
    smallest: int = 2**63
    largest: int = -1
    open_documents: int = 0
    """Number of documents that do not end with the end-of-document id."""
    first_open: int | None = None
    inner_ends: int = 0
    """Number of end-of-document ids inside documents."""
    first_inner: int | None = None
    """Position of the first of them."""

    def add(self, other: "_TokenStats") -> None:
        """Merges the statistics of the following range, except digests."""
        self.smallest = min(self.smallest, other.smallest)
        self.largest = max(self.largest, other.largest)
        self.open_documents += other.open_documents
        self.inner_ends += other.inner_ends
        self.first_open = other.first_open if self.first_open is None else self.first_open
        self.first_inner = other.first_inner if self.first_inner is None else self.first_inner


def _check_tokens(
    result: VerifyResult, index: Index | None, sidecar: Sidecar | None, workers: int, show_progress: bool
) -> None:
    path = bin_path(result.prefix)
    if index is not None:
        checked_index = index
        if not _passes(result, lambda: check_token_bytes(path, checked_index)):
            index = None
    elif not path.is_file():
        result.problems.append(f"{path}: file not found; {_AGAIN}")
    if sidecar is None or not path.is_file():
        return
    if index is None or index.dtype.kind not in "iu":
        # The checksum needs no token dtype; ids and documents cannot be checked without it.
        _check_checksum(result, path, sidecar, "bin", lambda path: file_checksum(path, workers))
        return
    read = _try(result, lambda: _read_tokens(path, index, sidecar, workers, show_progress))
    if read is None:
        return
    stats, checksum = read
    vocab_size, eod = sidecar.tokenizer.vocab_size, sidecar.eod_id
    result.checked.append(plural(index.tokens, "id") + (" and the end of every document" if sidecar.append_eod else ""))
    _check_checksum(result, path, sidecar, "bin", lambda _: checksum)
    if stats.smallest < 0 or stats.largest >= vocab_size:
        result.problems.append(
            f"{path}: got ids from {stats.smallest} to {stats.largest}, expected 0 to {vocab_size - 1} from the "
            f"sidecar; {_AGAIN}"
        )
    if stats.first_open is not None:
        result.problems.append(
            f"{path}: {plural(stats.open_documents, 'document')} without the end-of-document id {eod} at the end, "
            f"first document {stats.first_open:,} (from 0); {_AGAIN}"
        )
    if stats.first_inner is not None:
        result.problems.append(
            f"{path}: the end-of-document id {eod} occurs {stats.inner_ends:,} times inside documents, first at token "
            f"{stats.first_inner:,} (from 0); {_AGAIN}"
        )


def _read_tokens(
    path: Path, index: Index, sidecar: Sidecar, workers: int, show_progress: bool
) -> tuple[_TokenStats, str]:
    """Statistics of all tokens and the checksum of the file."""
    stats, digests = _TokenStats(), []
    with (
        path.open("rb", buffering=0) as file,
        stoppable_threads(workers) as (pool, check),
        Progress("verify", index.token_bytes, unit="B", unit_scale=True, enabled=show_progress) as progress,
    ):
        starts = range(0, index.token_bytes, CHECKSUM_BLOCK)
        read = partial(_read_block, file.fileno(), path, index, sidecar, check)
        for start, block in zip(starts, pool.map(read, starts), strict=True):
            stats.add(block)
            digests.append(block.digest)
            progress.update(min(CHECKSUM_BLOCK, index.token_bytes - start))
    return stats, checksum_of_blocks(digests)


def _read_block(
    descriptor: int, path: Path, index: Index, sidecar: Sidecar, check: Callable[[], None], start: int
) -> _TokenStats:
    """Statistics and digest of one checksum block."""
    import xxhash

    stats, digest = _TokenStats(), xxhash.xxh3_64()
    stop = min(start + CHECKSUM_BLOCK, index.token_bytes)
    for at in range(start, stop, _READ_BYTES):
        check()
        data = os.pread(descriptor, min(_READ_BYTES, stop - at), at)
        if len(data) < min(_READ_BYTES, stop - at):
            raise UserError(f"{path}: shrank while it was read; is another process writing to it?")
        digest.update(data)
        stats.add(_check_chunk(np.frombuffer(data, dtype=index.dtype), at // index.dtype.itemsize, index, sidecar))
    stats.digest = digest.digest()
    return stats


def _check_chunk(tokens: np.ndarray, first: int, index: Index, sidecar: Sidecar) -> _TokenStats:
    """Statistics of at least one token, starting at token `first` of the dataset."""
    stats = _TokenStats(smallest=int(tokens.min()), largest=int(tokens.max()))
    if not sidecar.append_eod:
        return stats
    documents, starts, ends = _documents_ending(index, first, first + len(tokens))
    is_end = tokens == sidecar.eod_id
    non_empty = ends > starts
    closed = non_empty & is_end[np.maximum(ends - 1 - first, 0)]
    if not closed.all():
        stats.open_documents = int(len(closed) - closed.sum())
        stats.first_open = documents + int(np.argmin(closed))
    is_end[ends[non_empty] - 1 - first] = False
    stats.inner_ends = int(np.count_nonzero(is_end))
    if stats.inner_ends:
        stats.first_inner = first + int(np.argmax(is_end))
    return stats


def _documents_ending(index: Index, first: int, stop: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Finds the documents whose last token is in `first` to `stop`, and empty documents between them.

    Returns:
        The number of the first document, and the first token and one past the last token of each.
    """

    def boundary_after(token: int) -> int:
        # First boundary after the token; empty sequences share their position.
        # bisect instead of numpy, which would copy the complete arrays: after the header they are not 8-byte aligned.
        sequence = bisect_right(index.pointers, token * index.dtype.itemsize)
        return bisect_left(index.boundaries, sequence)

    low = 1 if first == 0 else boundary_after(first)
    high = index.documents + 1 if stop == index.tokens else boundary_after(stop)
    positions = token_positions(index, index.boundaries[low - 1 : high])
    return low - 1, positions[:-1], positions[1:]


def _check_bitmap(result: VerifyResult, index: Index, sidecar: Sidecar, workers: int) -> None:
    path = words_path(result.prefix)
    segmenter = sidecar.segmenter or ""
    size_ok = _passes(result, lambda: check_words(result.prefix, index.tokens, segmenter))
    _check_checksum(result, path, sidecar, "words", lambda path: file_checksum(path, workers))
    if not size_ok or index.tokens == 0:
        return
    result.checked.append("word bitmap")
    bits = np.memmap(path, np.uint8, "r")
    if index.tokens % 8 and int(bits[-1]) >> index.tokens % 8:
        result.problems.append(
            f"{path}: has bits set after its {index.tokens:,} tokens; preprocess again with the segmenter"
        )
    for start in range(0, index.documents, _CHUNK):
        bounds = token_positions(index, index.boundaries[start : min(start + _CHUNK, index.documents) + 1])
        at = bounds[:-1][bounds[1:] > bounds[:-1]]
        unset = np.flatnonzero(bits[at // 8] >> (at % 8).astype(np.uint8) & 1 == 0)
        if len(unset):
            result.problems.append(
                f"{path}: no word starts at token {int(at[unset[0]]):,}, where a document starts; the file belongs to "
                "another dataset, preprocess again with the segmenter"
            )
            return
