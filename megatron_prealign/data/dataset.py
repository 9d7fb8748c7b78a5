"""A preprocessed dataset as the tools see it: its index and its sidecar, opened without torch and checked together."""

from dataclasses import dataclass
from pathlib import Path

import numpy

from megatron_prealign.data.indexed import Index, bin_path, check_token_bytes, idx_path, load_index
from megatron_prealign.data.sidecar import Sidecar, load_sidecar, sidecar_path
from megatron_prealign.data.word_bitmap import check_words, words_path
from megatron_prealign.errors import UserError


@dataclass(frozen=True, eq=False)
class Dataset:
    """One dataset on disk."""

    prefix: str
    """Path without ending."""
    index: Index
    sidecar: Sidecar | None
    """None for token files without one, as Megatron's own tools make them."""

    @property
    def bin(self) -> Path:
        return bin_path(self.prefix)

    @property
    def words(self) -> Path:
        return words_path(self.prefix)


def open_dataset(prefix: str, *, sidecar: bool = True) -> Dataset:
    """Opens a dataset, an empty one too; all that can be told without reading tokens is checked.

    Args:
        prefix: path without ending.
        sidecar: whether to read `PREFIX.json`.

    Raises:
        UserError: a file is missing or damaged, or the files are not of one dataset.
    """
    index = load_index(idx_path(prefix), prefix)
    check_token_bytes(bin_path(prefix), index)
    if not sidecar:
        return Dataset(prefix, index, None)
    facts = load_sidecar(prefix)
    for problem in contradictions(prefix, index, facts):
        raise UserError(problem)
    if facts.segmenter is not None:
        check_words(prefix, index.tokens, facts.segmenter)
    return Dataset(prefix, index, facts)


def contradictions(prefix: str, index: Index, sidecar: Sidecar) -> list[str]:
    """What the sidecar says otherwise than the index, one line each."""
    found = []
    if (index.documents, index.tokens) != (sidecar.documents, sidecar.tokens):
        found.append(
            f"{index.path}: holds {index.documents:,} documents and {index.tokens:,} tokens, its sidecar says "
            f"{sidecar.documents:,} and {sidecar.tokens:,}; the files are not of one dataset, preprocess again or mend "
            "it with megatron-prealign dataset repair"
        )
    vocab_size = sidecar.tokenizer.vocab_size
    narrow = too_narrow(prefix, index.dtype, vocab_size)
    if narrow is not None:
        found.append(narrow)
    if not 0 <= sidecar.eod_id < vocab_size:
        found.append(
            f"{sidecar_path(prefix)}: eod_id is {sidecar.eod_id}, expected an id from 0 to {vocab_size - 1}; "
            "preprocess again"
        )
    return found


def too_narrow(prefix: str, dtype: numpy.dtype, vocab_size: int) -> str | None:
    """What is wrong with the type in which tokens of a vocabulary are stored; None if it holds all ids."""
    if dtype.kind not in "iu":
        return f"{idx_path(prefix)}: its tokens are of type {dtype}, expected whole numbers; preprocess again"
    if vocab_size - 1 <= numpy.iinfo(dtype.name).max:
        return None
    return (
        f"{sidecar_path(prefix)}: the tokenizer has {vocab_size:,} ids, but {idx_path(prefix).name} stores them as "
        f"{dtype}, up to {numpy.iinfo(dtype.name).max:,}: larger ids became others; preprocess again"
    )


def token_positions(index: Index, sequences: numpy.ndarray) -> numpy.ndarray:
    """The token at which each of these sequences starts, int64; for the number of sequences, the number of tokens."""
    if index.sequences == 0:
        return numpy.zeros(len(sequences), dtype=numpy.int64)
    starts = index.pointers[numpy.minimum(sequences, index.sequences - 1)]
    return numpy.where(sequences < index.sequences, starts, index.token_bytes) // index.dtype.itemsize


def check_output_prefix(output: str) -> None:
    """Refuses what cannot be a prefix to write to.

    Raises:
        UserError: it has an ending or is a directory.
    """
    if output.endswith((".bin", ".idx", ".words", ".json")):
        raise UserError(
            f"output {output}: expected a path without ending; .bin, .idx, .json and, with a segmenter, .words are "
            "added to it"
        )
    if output.endswith("/") or Path(output).is_dir():
        raise UserError(
            f"output {output}: is a directory; expected a path inside it, for example {Path(output) / 'de'}"
        )


def check_workers(workers: int) -> None:
    """Raises `UserError` for a number of workers below 1."""
    if workers < 1:
        raise UserError(f"workers is {workers}; expected at least 1")
