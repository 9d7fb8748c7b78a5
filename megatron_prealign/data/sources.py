"""The datasets of a recipe opened, checked against each other and divided into training and held-out documents."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_prealign.data.dataset import too_narrow
from megatron_prealign.data.indexed import open_indexed
from megatron_prealign.data.sidecar import Sidecar, load_sidecar
from megatron_prealign.data.word_bitmap import WordBitmap
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.data import DataSection, DataSource, ValidationSource

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset


@dataclass(frozen=True)
class OpenSource:
    """A range of the sequences of one dataset, with what is known about them."""

    path: str
    """Prefix of the files, as the recipe has it."""
    language: str
    """Language code."""
    language_id: int
    """Index into the run's list of languages."""
    dataset: "IndexedDataset"
    """Megatron-Core's reader over the whole files."""
    sidecar: Sidecar
    """The facts beside the files."""
    start: int
    """First sequence of the range."""
    stop: int
    """One past the last sequence of the range."""
    words: WordBitmap | None = None
    """Where words start in the whole files, if a segmenter marked them; validation never opens it."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sequence of the range, int32 [stop - start]."""
        return self.dataset.sequence_lengths[self.start : self.stop]

    @property
    def tokens(self) -> int:
        """Tokens in the range."""
        return int(self.lengths.sum(dtype=np.int64))


def open_training_sources(
    data: DataSection,
    languages: Sequence[str],
    *,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
) -> list[OpenSource]:
    """The sources of the blend, each without the documents that validation holds out.

    Args:
        data: The recipe's section.
        languages: The run's languages; a source's position in it becomes its `language_id`.
        tokenizer_fingerprint: What the sidecars must name; None asks only that all name the same.
        vocab_size: Ids that the model has; None does not check.

    Raises:
        UserError: a file is missing or damaged, or the sidecars contradict the recipe or each other.
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
    """What validation reads: the validation datasets, or else the documents held out of each training source.

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
    """Fills `out` from the token stream that the sequences of `dataset` in the order of `sequences` form.

    Past the end of the stream the reading goes on at its beginning.

    Args:
        dataset: The reader.
        sequences: Sequence numbers, int [n]; at least one of them has tokens.
        position: Index into `sequences` where the span starts.
        offset: Token of that sequence where the span starts.
        out: int64 [tokens], written in place.
        words: The bitmap of the dataset.
        word_starts: bool [tokens], written in place if there is a bitmap: whether a word starts there.
    """
    for sequence, inside, part in _pieces(dataset.sequence_lengths, sequences, position, offset, len(out)):
        count = part.stop - part.start
        out[part] = dataset.get(sequence, offset=inside, length=count)
        if words is not None and word_starts is not None:
            word_starts[part] = words.read(sequence, inside, count)


def _pieces(
    lengths: np.ndarray, sequences: np.ndarray, position: int, offset: int, tokens: int
) -> Iterator[tuple[int, int, slice]]:
    """(sequence, its first token, place among `tokens`) of every sequence that a span meets."""
    filled = 0
    while filled < tokens:
        sequence = int(sequences[position % len(sequences)])
        count = min(int(lengths[sequence]) - offset, tokens - filled)
        if count > 0:
            yield sequence, offset, slice(filled, filled + count)
            filled += count
        position, offset = position + 1, 0


def check_token_range(tokens: np.ndarray, sources: Sequence[OpenSource], source_of_row: Sequence[int]) -> None:
    """Refuses ids that the source's tokenizer does not have.

    Such ids come from a damaged file or a sidecar of another dataset, and would fail inside the embedding on the
    device, without a word about the cause.

    Args:
        tokens: int64 [rows, tokens].
        sources: All sources; their tokenizers have one vocabulary.
        source_of_row: For each row its index into `sources`.

    Raises:
        UserError: an id is below 0 or not below the vocabulary size.
    """
    vocab_size = sources[0].sidecar.tokenizer.vocab_size
    if tokens.size == 0 or (tokens.min() >= 0 and tokens.max() < vocab_size):
        return
    row, column = np.argwhere((tokens < 0) | (tokens >= vocab_size))[0]
    raise UserError(
        f"{sources[source_of_row[row]].path}.bin: holds token id {tokens[row, column]}, expected ids from 0 to "
        f"{vocab_size - 1} as its sidecar says; make the dataset again with megatron-prealign preprocess"
    )


def _checked_sidecars(
    data: DataSection, tokenizer_fingerprint: str | None, vocab_size: int | None
) -> dict[str, Sidecar]:
    """The sidecars of training and validation by path, so that either side notices when they do not fit together."""
    expected, expected_by = tokenizer_fingerprint, f"the tokenizer {data.tokenizer}"
    sidecars: dict[str, Sidecar] = {}
    every: list[DataSource | ValidationSource] = [*data.sources, *data.validation]
    for source in every:
        where = f"{source.path}.json"
        sidecar = sidecars[source.path] = load_sidecar(source.path)
        tokenizer = sidecar.tokenizer
        if sidecar.language != source.language:
            raise UserError(
                f"{where}: language is {sidecar.language!r}, the recipe says {source.language!r}; correct the recipe's "
                "language or path, or preprocess the corpus again"
            )
        if expected is None:
            expected, expected_by = tokenizer.fingerprint, where
        if tokenizer.fingerprint != expected:
            raise UserError(
                f"{where}: made with tokenizer {tokenizer.path} ({tokenizer.fingerprint}), expected {expected} as in "
                f"{expected_by}; preprocess all data with the recipe's tokenizer {data.tokenizer}"
            )
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise UserError(
                f"{where}: its tokenizer has {tokenizer.vocab_size} ids, the model has {vocab_size}; raise "
                "model.vocab_size or preprocess with the model's tokenizer"
            )
    training = {Path(source.path).resolve() for source in data.sources}
    for held_out in data.validation:
        if Path(held_out.path).resolve() in training:
            raise UserError(
                f"data.validation: {held_out.path} is also in data.sources; leave data.validation empty to hold "
                "documents of the sources out, or name other files"
            )
    return sidecars


def _open(source: DataSource | ValidationSource, sidecar: Sidecar, languages: Sequence[str]) -> OpenSource:
    if source.language not in languages:
        raise UserError(
            f"{source.path}: language {source.language!r} is not among the run's languages {', '.join(languages)}; "
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
            f"{source.path}.idx: holds {documents} documents and {opened.tokens} tokens, its sidecar says "
            f"{sidecar.documents} and {sidecar.tokens}; the files are not of one dataset, preprocess again"
        )
    narrow = too_narrow(source.path, np.dtype(dataset.index.dtype), sidecar.tokenizer.vocab_size)
    if narrow is not None:
        raise UserError(narrow)
    return opened


def _with_words(source: OpenSource) -> OpenSource:
    segmenter = source.sidecar.segmenter
    if segmenter is None:
        return source
    return replace(source, words=WordBitmap(source.path, source.dataset, segmenter))


def _first_held_out(source: OpenSource, fraction: float) -> int:
    """Sequence at which the last `fraction` of the documents starts: at least one document, but never all."""
    documents = len(source.dataset.document_indices) - 1
    # Rounded first: 0.07 * 100 is a little above 7 in floating point.
    held_out = min(math.ceil(round(fraction * documents, 6)), max(documents - 1, 0))
    return int(source.dataset.document_indices[documents - held_out])
