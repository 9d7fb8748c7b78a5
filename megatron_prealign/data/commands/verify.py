"""Reads a whole dataset and lists everything about it that cannot be right."""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from megatron_prealign.data.dataset import check_workers, contradictions, token_positions
from megatron_prealign.data.indexed import Index, bin_path, check_token_bytes, idx_path, load_index
from megatron_prealign.data.sidecar import Sidecar, load_sidecar, sidecar_path
from megatron_prealign.data.word_bitmap import check_words, words_path
from megatron_prealign.errors import UserError
from megatron_prealign.files.checksum import CHECKSUM_BLOCK, checksum_of_blocks, file_checksum
from megatron_prealign.progress import Progress

_READ_BYTES = 4 * 1024 * 1024
# Documents looked at at a time.
_CHUNK = 1 << 18
_AGAIN = "make the dataset again with megatron-prealign preprocess"

T = TypeVar("T")


@dataclass
class VerifyResult:
    """What is wrong with one dataset, and what was looked at."""

    prefix: str
    problems: list[str] = field(default_factory=list)
    """One line each; empty if all is well."""
    checked: list[str] = field(default_factory=list)
    """What was compared, for people."""


def verify(prefix: str, *, workers: int = 1, tokenizer: str | None = None, show_progress: bool = True) -> VerifyResult:
    """Checks a dataset: header, sizes and sums of the index; every id; the end of every document; the checksums; the
    bitmap of words; the sidecar's counts. It reads every byte once.

    Args:
        prefix: path without ending.
        workers: threads that read and check. Memory: about 40 MiB each.
        tokenizer: also compare the sidecar with this tokenizer.
        show_progress: whether to write a progress bar to standard error.

    Raises:
        UserError: a bad option, or a tokenizer that cannot be opened. What is wrong with the dataset is listed.
    """
    check_workers(workers)
    result = VerifyResult(prefix)
    sidecar = _listed(result, lambda: load_sidecar(prefix))
    if sidecar is not None and tokenizer is not None:
        _check_tokenizer(result, sidecar, tokenizer)
    index = _listed(result, lambda: load_index(idx_path(prefix), prefix))
    if index is not None:
        result.checked.append(f"the index of {index.documents:,} documents")
        if index.tokens == 0 and (sidecar is None or sidecar.shard is None):
            result.problems.append(f"{index.path}: holds no tokens; {_AGAIN}")
        if sidecar is not None:
            result.problems += contradictions(prefix, index, sidecar)
    _check_tokens(result, index, sidecar, workers, show_progress)
    if sidecar is not None:
        _check_sum(result, idx_path(prefix), sidecar, "idx", lambda path: file_checksum(path, workers))
        if sidecar.segmenter is not None and index is not None:
            _check_bitmap(result, index, sidecar, workers)
        if not sidecar.checksums:
            result.checked.append("no checksums, for the sidecar has none (dataset repair writes them)")
    return result


def _listed(result: VerifyResult, check: Callable[[], T]) -> T | None:
    """What `check` returns; what it complains of is a problem, and then the answer is None."""
    try:
        return check()
    except UserError as error:
        result.problems.append(str(error))
    except OSError as error:
        result.problems.append(f"{error.filename or result.prefix}: cannot be read ({error.strerror})")
    return None


def _passes(result: VerifyResult, check: Callable[[], object]) -> bool:
    return _listed(result, lambda: (check(),)) is not None


def _check_tokenizer(result: VerifyResult, sidecar: Sidecar, path: str) -> None:
    from megatron_prealign.tokenizer.load import load_tokenizer

    tokenizer = load_tokenizer(path)
    result.checked.append(f"the tokenizer {path}")
    for name, ours, theirs in (
        ("tokenizer.fingerprint", sidecar.tokenizer.fingerprint, tokenizer.fingerprint),
        ("tokenizer.vocab_size", sidecar.tokenizer.vocab_size, tokenizer.vocab_size),
        ("eod_id", sidecar.eod_id, tokenizer.eod_id),
    ):
        if ours != theirs:
            result.problems.append(
                f"{sidecar_path(result.prefix)}: {name} is {ours}, that of the tokenizer {path} is {theirs}; give the "
                "tokenizer that made the dataset, or preprocess again with this one"
            )


def _check_sum(
    result: VerifyResult, path: Path, sidecar: Sidecar, name: str, measure: Callable[[Path], str | None]
) -> None:
    expected = sidecar.checksums.get(name)
    if expected is None or not path.is_file():
        # A missing file is listed by those who open it.
        return
    found = _listed(result, lambda: measure(path))
    if found is None:
        return
    result.checked.append(f"the checksum of .{name}")
    if found != expected:
        result.problems.append(
            f"{path}: its checksum is {found}, expected {expected} as the sidecar says; its content has changed, copy "
            "or make it again"
        )


@dataclass
class _Found:
    """What was seen in a stretch of tokens."""

    digest: bytes = b""
    smallest: int = 2**63
    largest: int = -1
    open_documents: int = 0
    """Documents without the end-of-document id at their end."""
    first_open: int | None = None
    inner_ends: int = 0
    """End-of-document ids elsewhere."""
    first_inner: int | None = None
    """The first token that is one."""

    def add(self, other: "_Found") -> None:
        """Adds the stretch behind this one; digests are none of it."""
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
        sized = index
        if not _passes(result, lambda: check_token_bytes(path, sized)):
            index = None
    elif not path.is_file():
        result.problems.append(f"{path}: no such file; {_AGAIN}")
    if sidecar is None or not path.is_file():
        return
    if index is None or index.dtype.kind not in "iu":
        # Their checksum can always be taken, ids and documents only looked up in tokens of a known size.
        _check_sum(result, path, sidecar, "bin", lambda path: file_checksum(path, workers))
        return
    found = _listed(result, lambda: _read_tokens(path, index, sidecar, workers, show_progress))
    if found is None:
        return
    whole, checksum = found
    vocab_size, eod = sidecar.tokenizer.vocab_size, sidecar.eod_id
    result.checked.append(f"{index.tokens:,} ids" + (" and the end of every document" if sidecar.append_eod else ""))
    _check_sum(result, path, sidecar, "bin", lambda _: checksum)
    if whole.smallest < 0 or whole.largest >= vocab_size:
        result.problems.append(
            f"{path}: holds ids from {whole.smallest} to {whole.largest}, expected 0 to {vocab_size - 1} as the "
            f"sidecar says; {_AGAIN}"
        )
    if whole.first_open is not None:
        result.problems.append(
            f"{path}: {whole.open_documents:,} documents do not end with the end-of-document id {eod}, the first is "
            f"number {whole.first_open:,} (from 0); {_AGAIN}"
        )
    if whole.first_inner is not None:
        result.problems.append(
            f"{path}: the end-of-document id {eod} stands {whole.inner_ends:,} times inside documents, first as token "
            f"{whole.first_inner:,} (from 0); {_AGAIN}"
        )


def _read_tokens(path: Path, index: Index, sidecar: Sidecar, workers: int, show_progress: bool) -> tuple[_Found, str]:
    """What all tokens tell, and their checksum."""
    whole, digests = _Found(), []
    with (
        path.open("rb", buffering=0) as file,
        ThreadPoolExecutor(workers) as pool,
        Progress("verify", index.token_bytes, unit="B", unit_scale=True, enabled=show_progress) as progress,
    ):
        starts = range(0, index.token_bytes, CHECKSUM_BLOCK)
        for start, found in zip(
            starts, pool.map(lambda start: _read_block(file.fileno(), path, index, sidecar, start), starts), strict=True
        ):
            whole.add(found)
            digests.append(found.digest)
            progress.update(min(CHECKSUM_BLOCK, index.token_bytes - start))
    return whole, checksum_of_blocks(digests)


def _read_block(descriptor: int, path: Path, index: Index, sidecar: Sidecar, start: int) -> _Found:
    """Looks at one block of the checksum."""
    import xxhash

    block, digest = _Found(), xxhash.xxh3_64()
    stop = min(start + CHECKSUM_BLOCK, index.token_bytes)
    for at in range(start, stop, _READ_BYTES):
        data = os.pread(descriptor, min(_READ_BYTES, stop - at), at)
        if len(data) < min(_READ_BYTES, stop - at):
            raise UserError(f"{path}: became shorter while it was read; who else writes to it?")
        digest.update(data)
        block.add(_look(np.frombuffer(data, dtype=index.dtype), at // index.dtype.itemsize, index, sidecar))
    block.digest = digest.digest()
    return block


def _look(tokens: np.ndarray, first: int, index: Index, sidecar: Sidecar) -> _Found:
    """Looks at the tokens from number `first` on, at least one."""
    found = _Found(smallest=int(tokens.min()), largest=int(tokens.max()))
    if not sidecar.append_eod:
        return found
    documents, begins, ends = _documents_ending(index, first, first + len(tokens))
    is_end = tokens == sidecar.eod_id
    filled = ends > begins
    closed = filled & is_end[np.maximum(ends - 1 - first, 0)]
    if not closed.all():
        found.open_documents = int(len(closed) - closed.sum())
        found.first_open = documents + int(np.argmin(closed))
    is_end[ends[filled] - 1 - first] = False
    found.inner_ends = int(np.count_nonzero(is_end))
    if found.inner_ends:
        found.first_inner = first + int(np.argmax(is_end))
    return found


def _documents_ending(index: Index, first: int, stop: int) -> tuple[int, np.ndarray, np.ndarray]:
    """The documents whose last token is among the tokens `first` to `stop`, and empty ones between them: the number of
    the first, and of each its first token and one past its last."""

    def boundary_behind(token: int) -> int:
        # The first boundary that lies behind the token; sequences without tokens share their place.
        # Not by numpy, which would copy the whole arrays first: behind the header they do not lie on multiples of 8.
        sequence = bisect_right(index.pointers, token * index.dtype.itemsize)
        return bisect_left(index.boundaries, sequence)

    low = 1 if first == 0 else boundary_behind(first)
    high = index.documents + 1 if stop == index.tokens else boundary_behind(stop)
    positions = token_positions(index, index.boundaries[low - 1 : high])
    return low - 1, positions[:-1], positions[1:]


def _check_bitmap(result: VerifyResult, index: Index, sidecar: Sidecar, workers: int) -> None:
    path = words_path(result.prefix)
    segmenter = sidecar.segmenter or ""
    fits = _passes(result, lambda: check_words(result.prefix, index.tokens, segmenter))
    _check_sum(result, path, sidecar, "words", lambda path: file_checksum(path, workers))
    if not fits or index.tokens == 0:
        return
    result.checked.append("the marks of words")
    bits = np.memmap(path, np.uint8, "r")
    if index.tokens % 8 and int(bits[-1]) >> index.tokens % 8:
        result.problems.append(
            f"{path}: has bits behind its {index.tokens:,} tokens; preprocess again with the segmenter"
        )
    for start in range(0, index.documents, _CHUNK):
        bounds = token_positions(index, index.boundaries[start : min(start + _CHUNK, index.documents) + 1])
        at = bounds[:-1][bounds[1:] > bounds[:-1]]
        unset = np.flatnonzero(bits[at // 8] >> (at % 8).astype(np.uint8) & 1 == 0)
        if len(unset):
            result.problems.append(
                f"{path}: no word starts at token {int(at[unset[0]]):,}, where a document starts; it is of another "
                "dataset, preprocess again with the segmenter"
            )
            return
