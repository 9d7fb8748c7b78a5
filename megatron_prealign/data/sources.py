"""Opens the datasets of a recipe, checks them against each other and splits off held-out documents."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_prealign.data.dataset import dtype_problem
from megatron_prealign.data.indexed import Index, open_indexed
from megatron_prealign.data.sidecar import Sidecar, load_sidecar
from megatron_prealign.data.word_bitmap import WordBitmap
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.data import DataSection, DataSource, ValidationSource

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


@dataclass(frozen=True)
class OpenSource:
    """A range of sequences of an open dataset, with its metadata."""

    path: str
    """Prefix of the files, as in the recipe."""
    language: str
    """Language code."""
    language_id: int
    """Index in the run's list of languages."""
    dataset: "IndexedDataset"
    """Megatron-Core's reader of the complete dataset."""
    sidecar: Sidecar
    """Metadata of the dataset."""
    start: int
    """First sequence of the range."""
    stop: int
    """One past the last sequence of the range."""
    words: WordBitmap | None = None
    """Word starts of the complete dataset, if a segmenter marked them; never opened for validation."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sequence of the range, int32 [stop - start]."""
        return self.dataset.sequence_lengths[self.start : self.stop]

    @property
    def tokens(self) -> int:
        """Number of tokens in the range."""
        return int(self.lengths.sum(dtype=np.int64))


def open_training_sources(
    data: DataSection,
    languages: Sequence[str],
    *,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
) -> list[OpenSource]:
    """Opens the sources of the blend, each without its held-out validation documents.

    Args:
        data: The recipe's `data` section.
        languages: The run's languages; the index of a source's language becomes its `language_id`.
        tokenizer_fingerprint: Fingerprint that all sidecars must have; None only requires that they agree.
        vocab_size: Vocabulary size of the model; None skips the check.

    Raises:
        UserError: A file is missing or corrupt, or the sidecars contradict the recipe or each other.
    """
    sidecars = _checked_sidecars(data, tokenizer_fingerprint, vocab_size)
    opened = [_with_words(_open(source, sidecars[source.path], languages)) for source in data.sources]
    if data.validation:
        return opened
    return [replace(source, stop=_first_held_out(source, data.validation_fraction)) for source in opened]


def open_validation_sources(
    data: DataSection,
    languages: Sequence[str],
    *,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
) -> list[OpenSource]:
    """Opens the validation datasets or, if there are none, the documents held out of each training source.

    Arguments and errors are those of `open_training_sources`.
    """
    sidecars = _checked_sidecars(data, tokenizer_fingerprint, vocab_size)
    if data.validation:
        return [_open(source, sidecars[source.path], languages) for source in data.validation]
    opened = [_open(source, sidecars[source.path], languages) for source in data.sources]
    return [replace(source, start=_first_held_out(source, data.validation_fraction)) for source in opened]


def read_span(
    dataset: "IndexedDataset",
    sequences: np.ndarray,
    position: int,
    offset: int,
    out: np.ndarray,
    words: WordBitmap | None = None,
    word_starts: np.ndarray | None = None,
) -> None:
    """Fills `out` from the token stream formed by the sequences of `dataset` in the order of `sequences`.

    Past the end of the stream, reading continues at its start.

    Args:
        dataset: The reader.
        sequences: Sequence numbers, int [n]; at least one of them has tokens.
        position: Index into `sequences` where the span starts.
        offset: Token of that sequence where the span starts.
        out: int64 [tokens], written in place.
        words: Word bitmap of the dataset.
        word_starts: bool [tokens], written in place if there is a bitmap: whether a word starts at each token.
    """
    for sequence, inside, part in _span_parts(dataset.sequence_lengths, sequences, position, offset, len(out)):
        count = part.stop - part.start
        out[part] = dataset.get(sequence, offset=inside, length=count)
        if words is not None and word_starts is not None:
            word_starts[part] = words.read(sequence, inside, count)


def _span_parts(
    lengths: np.ndarray, sequences: np.ndarray, position: int, offset: int, tokens: int
) -> Iterator[tuple[int, int, slice]]:
    """Yields (sequence, first token in it, slice of the span) for every sequence that the span overlaps."""
    filled = 0
    while filled < tokens:
        sequence = int(sequences[position % len(sequences)])
        count = min(int(lengths[sequence]) - offset, tokens - filled)
        if count > 0:
            yield sequence, offset, slice(filled, filled + count)
            filled += count
        position, offset = position + 1, 0


def check_token_range(tokens: np.ndarray, sources: Sequence[OpenSource], source_of_sample: Sequence[int]) -> None:
    """Checks that all ids are in the vocabulary of the tokenizer.

    Invalid ids come from a corrupt file or the sidecar of another dataset. Without the check they would fail in the
    embedding on the device, with an error that does not point to the cause.

    Args:
        tokens: int64 [samples, tokens].
        sources: All sources; their tokenizers have the same vocabulary.
        source_of_sample: Index into `sources` of each sample.

    Raises:
        UserError: An id is negative or not below the vocabulary size.
    """
    vocab_size = sources[0].sidecar.tokenizer.vocab_size
    if tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return
    sample, position = np.argwhere((tokens < 0) | (tokens >= vocab_size))[0]
    raise UserError(
        f"{sources[source_of_sample[sample]].path}.bin: got token id {tokens[sample, position]}, expected ids from 0 "
        f"to {vocab_size - 1} as in its sidecar; recreate the dataset with megatron-prealign preprocess"
    )


def _checked_sidecars(
    data: DataSection, tokenizer_fingerprint: str | None, vocab_size: int | None
) -> dict[str, Sidecar]:
    """Loads the sidecars of training and validation by path; both are always checked, whichever is opened."""
    expected, expected_by = tokenizer_fingerprint, f"the tokenizer {data.tokenizer}"
    sidecars: dict[str, Sidecar] = {}
    all_sources: list[DataSource | ValidationSource] = [*data.sources, *data.validation]
    for source in all_sources:
        where = f"{source.path}.json"
        sidecar = sidecars[source.path] = load_sidecar(source.path)
        tokenizer = sidecar.tokenizer
        if sidecar.language != source.language:
            raise UserError(
                f"{where}: language is {sidecar.language!r}, but the recipe says {source.language!r}; correct the "
                "recipe's language or path, or preprocess the corpus again"
            )
        if expected is None:
            expected, expected_by = tokenizer.fingerprint, where
        if tokenizer.fingerprint != expected:
            raise UserError(
                f"{where}: preprocessed with tokenizer {tokenizer.path} ({tokenizer.fingerprint}), expected {expected} "
                f"as in {expected_by}; preprocess all data with the recipe's tokenizer {data.tokenizer}"
            )
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{where}: its tokenizer has {tokenizer.vocab_size} ids, but the model has {vocab_size}; increase "
                "model.vocab_size or preprocess with the model's tokenizer"
            )
    training = {Path(source.path).resolve() for source in data.sources}
    for held_out in data.validation:
        if Path(held_out.path).resolve() in training:
            raise UserError(
                f"data.validation: {held_out.path} is also in data.sources; leave data.validation empty to hold out "
                "documents of the sources, or set other files"
            )
    return sidecars


def _open(source: DataSource | ValidationSource, sidecar: Sidecar, languages: Sequence[str]) -> OpenSource:
    if source.language not in languages:
        raise UserError(
            f"{source.path}: language {source.language!r} is not one of the run's languages {', '.join(languages)}; "
            "correct the recipe"
        )
    dataset = open_indexed(source.path)
    documents = len(dataset.document_indices) - 1
    sequences = len(dataset)
    opened = OpenSource(
        path=source.path,
        language=source.language,
        language_id=list(languages).index(source.language),
        dataset=dataset,
        sidecar=sidecar,
        start=0,
        stop=sequences,
    )
    if (documents, opened.tokens) != (sidecar.documents, sidecar.tokens):
        raise UserError(
            f"{source.path}.idx: contains {documents} documents and {opened.tokens} tokens, but its sidecar lists "
            f"{sidecar.documents} and {sidecar.tokens}; the files do not belong together: preprocess again"
        )
    problem = dtype_problem(source.path, np.dtype(dataset.index.dtype), sidecar.tokenizer.vocab_size)
    if problem is not None:
        raise UserError(problem)
    return opened


def _with_words(source: OpenSource) -> OpenSource:
    segmenter = source.sidecar.segmenter
    if segmenter is None:
        return source
    return replace(source, words=WordBitmap(source.path, source.dataset, segmenter))


def held_out_documents(documents: int, fraction: float) -> int:
    """Number of documents to hold out: `fraction` of them, at least one but never all; none if it is 0."""
    # Rounded before ceil: 0.07 * 100 is slightly above 7 in floating point.
    return min(math.ceil(round(fraction * documents, 6)), max(documents - 1, 0))


def count_training_tokens(index: Index, fraction: float) -> int:
    """Number of tokens of a dataset without the last `fraction` of its documents, as in `open_training_sources`."""
    stop = int(index.boundaries[index.documents - held_out_documents(index.documents, fraction)])
    return int(index.lengths[:stop].sum(dtype=np.int64))


def _first_held_out(source: OpenSource, fraction: float) -> int:
    """First sequence of the last `fraction` of the documents."""
    documents = len(source.dataset.document_indices) - 1
    return int(source.dataset.document_indices[documents - held_out_documents(documents, fraction)])
