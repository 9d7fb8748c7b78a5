"""Selects the sentence pairs of parallel text for sentence retrieval. Does not import torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.data.dataset import Dataset, open_dataset, token_positions
from megatron_prealign.data.sidecar import Sidecar, sidecar_path
from megatron_prealign.errors import UserError
from megatron_prealign.evaluation.word_pairs import WordPairs
from megatron_prealign.recipe import ParallelText, Recipe
from megatron_prealign.text import plural

MAX_SENTENCE_TOKENS = 128
# Documents whose lengths are read at a time.
_CHUNK = 1 << 16

Sentence = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class SentencePairs:
    """Sentence pairs of one entry of data.parallel_text."""

    field: str
    """The entry, such as `data.parallel_text[0]`."""
    languages: tuple[str, str]
    documents: int
    """Number of pairs of documents."""
    max_tokens: int
    """Most tokens of a sentence."""
    pairs: WordPairs | None
    """The pairs to measure; None if no pair of documents fits."""

    @property
    def name(self) -> str:
        """Name of the language pair, such as `en-de`."""
        return "-".join(self.languages)

    @property
    def measured(self) -> int:
        """Number of pairs to measure."""
        return 0 if self.pairs is None else len(self.pairs.links)


def measured_pairs(texts: Sequence[SentencePairs]) -> list[WordPairs]:
    """The pairs to measure of all entries that have any."""
    return [text.pairs for text in texts if text.pairs is not None]


def open_parallel_text(recipe: Recipe, *, tokenizer_fingerprint: str) -> list[SentencePairs]:
    """Opens the parallel text of a recipe and selects the sentence pairs of each entry.

    These are the first `training.retrieval_sentences` pairs of documents of which neither is empty or longer than
    `MAX_SENTENCE_TOKENS` or data.seq_length. The special tokens that `preprocess` added are left out. A pair of the
    same tokens as another pair counts once.

    Args:
        tokenizer_fingerprint: Fingerprint of the run's tokenizer.

    Raises:
        UserError: A dataset is missing or corrupt, or preprocessed with another tokenizer; two datasets are not
            parallel, or of the same language; two entries have the same languages.
    """
    texts: list[SentencePairs] = []
    for number, entry in enumerate(recipe.data.parallel_text):
        field = f"data.parallel_text[{number}]"
        text = _open(recipe, entry, field, tokenizer_fingerprint)
        for other in texts:
            if other.languages == text.languages:
                raise UserError(
                    f"{field}: languages are {text.name}, as in {other.field}; expected each pair once: merge the "
                    "datasets with megatron-prealign dataset merge, or remove one entry"
                )
        texts.append(text)
    return texts


def _open(recipe: Recipe, entry: ParallelText, field: str, tokenizer_fingerprint: str) -> SentencePairs:
    source, target = (_Side(prefix, recipe, tokenizer_fingerprint) for prefix in (entry.source, entry.target))
    languages = (source.sidecar.language, target.sidecar.language)
    for side, expected in zip((source, target), entry.languages or languages, strict=True):
        if side.sidecar.language != expected:
            raise UserError(
                f"{side.prefix}: language is {side.sidecar.language}, but {field}.languages says {expected}; fix the "
                "recipe or preprocess the dataset again"
            )
    if languages[0] == languages[1]:
        raise UserError(
            f"{field}: {source.prefix} and {target.prefix} are both of language {languages[0]}, expected two "
            "languages; correct a path, or preprocess one dataset again with its --language"
        )
    if source.documents != target.documents:
        raise UserError(
            f"{field}: {source.prefix} has {source.documents:,} documents and {target.prefix} {target.documents:,}, "
            "expected as many, document i of one being the translation of document i of the other; preprocess both "
            "from the same pairs (docs/alignment.md)"
        )
    # A model has at least data.seq_length positions.
    max_tokens = min(MAX_SENTENCE_TOKENS, recipe.data.seq_length)
    pairs: dict[tuple[Sentence, Sentence], None] = {}
    for pair in _sentences(source, target, max_tokens):
        pairs[pair] = None
        if len(pairs) == recipe.training.retrieval_sentences:
            break
    return SentencePairs(
        field, languages, source.documents, max_tokens, WordPairs.from_pairs(languages, pairs) if pairs else None
    )


def _sentences(source: "_Side", target: "_Side", max_tokens: int) -> Iterator[tuple[Sentence, Sentence]]:
    """Yields the pairs of documents that fit, in order."""
    for first in range(0, source.documents, _CHUNK):
        bounds = [side.bounds(first, min(first + _CHUNK, source.documents)) for side in (source, target)]
        lengths = np.stack([ends - starts for starts, ends in bounds])
        for index in np.flatnonzero(((lengths > 0) & (lengths <= max_tokens)).all(axis=0)):
            (source_start, source_end), (target_start, target_end) = ((b[0][index], b[1][index]) for b in bounds)
            yield source.read(source_start, source_end), target.read(target_start, target_end)


class _Side:
    """One of the two datasets of parallel text."""

    def __init__(self, prefix: str, recipe: Recipe, tokenizer_fingerprint: str) -> None:
        self.prefix = prefix
        self._dataset: Dataset = open_dataset(prefix)
        assert self._dataset.sidecar is not None
        self.sidecar: Sidecar = self._dataset.sidecar
        self.documents = self._dataset.index.documents
        tokenizer = self.sidecar.tokenizer
        if tokenizer.fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"{prefix}: preprocessed with another tokenizer ({tokenizer.path}), expected data.tokenizer "
                f"({recipe.data.tokenizer}); preprocess it again or fix data.tokenizer"
            )
        if self.sidecar.skipped_count:
            skipped = plural(self.sidecar.skipped_count, "document")
            raise UserError(
                f"{sidecar_path(prefix)}: preprocess skipped {skipped}, expected none in parallel text: all documents "
                "after it would be paired with the wrong one; remove the pairs with an empty or bad side from both "
                "inputs and preprocess both again (docs/alignment.md)"
            )
        index = self._dataset.index
        self._tokens = np.memmap(self._dataset.bin, index.dtype, "r") if index.tokens else np.empty(0, index.dtype)

    def bounds(self, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First token, and one past the last token, of the documents from `first` to `last` - 1, without special
        tokens."""
        index = self._dataset.index
        positions = token_positions(index, index.boundaries[first : last + 1])
        return positions[:-1] + self.sidecar.bos, positions[1:] - self.sidecar.append_eod

    def read(self, start: int, end: int) -> Sentence:
        """Token ids from `start` to `end` - 1.

        Raises:
            UserError: An id is not in the vocabulary of the tokenizer.
        """
        tokens = self._tokens[start:end]
        vocab_size = self.sidecar.tokenizer.vocab_size
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
            raise UserError(
                f"{self._dataset.bin}: got token ids from {tokens.min()} to {tokens.max()}, expected 0 to "
                f"{vocab_size - 1} as in its sidecar; recreate the dataset with megatron-prealign preprocess"
            )
        return tuple(tokens.tolist())
