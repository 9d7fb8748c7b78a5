"""Opens the index and sidecar of a preprocessed dataset without torch and checks that they match."""

from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_prealign.data.indexed import Index, bin_path, check_token_bytes, idx_path, load_index
from megatron_prealign.data.sidecar import Sidecar, load_sidecar, sidecar_path
from megatron_prealign.data.word_bitmap import check_words, words_path
from megatron_prealign.errors import UserError


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset on disk."""

    prefix: str
    """Path without extension."""
    index: Index
    sidecar: Sidecar | None
    """None for token files without a sidecar, such as those of Megatron-LM's own tools."""

    @property
    def bin(self) -> Path:
        return bin_path(self.prefix)

    @property
    def words(self) -> Path:
        return words_path(self.prefix)


def open_dataset(prefix: str, *, sidecar: bool = True) -> Dataset:
    """Opens a dataset, which may be empty, and checks everything that does not require reading tokens.

    Args:
        prefix: Path without extension.
        sidecar: Whether to read `PREFIX.json`.

    Raises:
        UserError: A file is missing or corrupt, or the files do not belong to the same dataset.
    """
    index = load_index(idx_path(prefix), prefix)
    check_token_bytes(bin_path(prefix), index)
    if not sidecar:
        return Dataset(prefix, index, None)
    loaded = load_sidecar(prefix)
    for problem in sidecar_mismatches(prefix, index, loaded):
        raise UserError(problem)
    if loaded.segmenter is not None:
        check_words(prefix, index.tokens, loaded.segmenter)
    return Dataset(prefix, index, loaded)


def sidecar_mismatches(prefix: str, index: Index, sidecar: Sidecar) -> list[str]:
    """Differences between sidecar and index, one line each."""
    problems = []
    if (index.documents, index.tokens) != (sidecar.documents, sidecar.tokens):
        problems.append(
            f"{index.path}: contains {index.documents:,} documents and {index.tokens:,} tokens, but its sidecar lists "
            f"{sidecar.documents:,} and {sidecar.tokens:,}; the files do not belong together: preprocess again or run "
            "megatron-prealign dataset repair"
        )
    vocab_size = sidecar.tokenizer.vocab_size
    problem = dtype_problem(prefix, index.dtype, vocab_size)
    if problem is not None:
        problems.append(problem)
    if not 0 <= sidecar.eod_id < vocab_size:
        problems.append(
            f"{sidecar_path(prefix)}: eod_id is {sidecar.eod_id}, expected an id from 0 to {vocab_size - 1}; "
            "preprocess again"
        )
    return problems


def dtype_problem(prefix: str, dtype: numpy.dtype, vocab_size: int) -> str | None:
    """Why `dtype` cannot store all token ids of a vocabulary; None if it can."""
    if dtype.kind not in "iu":
        return f"{idx_path(prefix)}: token dtype is {dtype}, expected an integer dtype; preprocess again"
    if vocab_size - 1 <= numpy.iinfo(dtype.name).max:
        return None
    return (
        f"{sidecar_path(prefix)}: the tokenizer has {vocab_size:,} ids, but {idx_path(prefix).name} stores them as "
        f"{dtype} (at most {numpy.iinfo(dtype.name).max:,}), which wraps larger ids; preprocess again"
    )


def token_positions(index: Index, sequences: numpy.ndarray) -> numpy.ndarray:
    """First token of each sequence in `sequences`, int64; for the value `index.sequences`, the number of tokens."""
    if index.sequences == 0:
        return numpy.zeros(len(sequences), dtype=numpy.int64)
    starts = index.pointers[numpy.minimum(sequences, index.sequences - 1)]
    return numpy.where(sequences < index.sequences, starts, index.token_bytes) // index.dtype.itemsize


def check_output_prefix(output: str) -> None:
    """Checks that `output` is a valid output prefix.

    Raises:
        UserError: It has an extension or is a directory.
    """
    if output.endswith((".bin", ".idx", ".words", ".json")):
        raise UserError(
            f"--output {output}: expected a path without extension; .bin, .idx, .json and, with a segmenter, .words "
            "are "
            "appended"
        )
    if output.endswith("/") or Path(output).is_dir():
        raise UserError(
            f"--output {output} is a directory; expected a path inside it, for example {Path(output) / 'de'}"
        )


MOST_WORKERS = 1024
"""Far more processes than cores exhaust the machine before the first one reads a document."""


def check_workers(workers: int) -> None:
    """Raises `UserError` unless `workers` is a number of processes that a machine can start."""
    if workers < 1:
        raise UserError(f"--workers is {workers}, expected at least 1")
    if workers > MOST_WORKERS:
        raise UserError(f"--workers is {workers}, expected at most {MOST_WORKERS:,}")
