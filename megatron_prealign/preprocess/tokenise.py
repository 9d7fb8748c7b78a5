"""Tokenises the documents of a block, with a fast engine that is checked on a sample of every block."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy

from megatron_prealign.corpus.blocks import Block, Limits
from megatron_prealign.corpus.readers import EMPTY, Documents, Fields, parse_block
from megatron_prealign.data.indexed import token_dtype
from megatron_prealign.data.word_bitmap import token_word_starts
from megatron_prealign.errors import UserError
from megatron_prealign.resources import release_memory
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.gigatoken_engine import RowEngine, UnsuitableTextError
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.tokenizer.segmenters import Segmenter, checked_word_starts, open_segmenter, resolve_segmenter

# Documents per block and dataset, and characters per document, that are also encoded by the plain tokenizer: about
# 0.3 % of the text, a few percent of the time with an engine ten times as fast.
_COMPARED_DOCUMENTS = 3
_COMPARED_CHARACTERS = 2_000
# The tokenizers library needs up to 160 bytes of memory per byte of text: 1.6 GB for one of 10 MB that gave 6.8
# million tokens, of which the C library would retain 1.1 GB.
_LARGE_CHARACTERS = 4 << 20
# Counting words costs as much as parsing JSON; a sample is enough for tokens per word.
_COUNTED_DOCUMENTS = 16


class Route(NamedTuple):
    """Dataset that a text belongs to."""

    column: int
    """Index into `Documents.texts`."""
    language: str


@dataclass
class TokenisedTexts:
    """Tokens that one block adds to one dataset."""

    ids: numpy.ndarray
    """Concatenated documents, each with its end-of-document id, in the dtype of the file."""
    lengths: numpy.ndarray
    """int32 [documents], tokens per document."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    word_starts: numpy.ndarray | None
    """bool, one per id; None without a segmenter."""


@dataclass
class TokenisedBlock:
    """Result of a worker for one block."""

    routes: dict[Route, TokenisedTexts] = field(default_factory=dict)
    lines: int = 0
    """Number of lines or rows in the block."""
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    """See `Documents`."""
    unlisted: int = 0
    """See `Documents`."""
    fatal_error: tuple[int, str] | None = None
    """Line and message of an error of the tokenizer or the segmenter, which must not be skipped."""
    mismatch: int | None = None
    """Line where the ids of the fast engine were wrong; the plain tokenizer encoded this block."""
    counted_words: int = 0
    """White-space-separated words in a sample of the documents."""
    counted_tokens: int = 0
    """Tokens of the same documents."""


@dataclass(frozen=True)
class TokeniserSettings:
    """Settings of a worker process."""

    tokenizer: str
    fields: Fields
    limits: Limits
    language: str | None
    """Language of all documents; None if each has its own."""
    segmenter: str | None
    """A name for `segmenters.open_segmenter`, `auto` or None."""


class BlockTokeniser:
    """Tokenises one block at a time."""

    def __init__(
        self,
        settings: TokeniserSettings,
        tokenizer: Tokenizer | None = None,
        large_texts: AbstractContextManager[object] | None = None,
    ) -> None:
        """Loads the tokenizer unless it is passed. `large_texts` is a lock shared by all workers: only one at a time
        encodes a large text with the tokenizer's own library."""
        self.settings = settings
        self._large_texts = nullcontext() if large_texts is None else large_texts
        self.tokenizer = load_tokenizer(Path(settings.tokenizer)) if tokenizer is None else tokenizer
        self._dtype = token_dtype(self.tokenizer.vocab_size)
        self._engines: dict[str, RowEngine | None] = {}
        self._segmenters: dict[str, Segmenter | None] = {}
        if settings.language is not None:
            self.segmenter(settings.language)

    def __call__(self, block: Block, plain: bool) -> TokenisedBlock:
        """Tokenises a block; with `plain`, uses the tokenizer's own library."""
        documents = parse_block(block, self.settings.fields, self.settings.limits)
        result = TokenisedBlock(lines=documents.lines)
        try:
            for route, indices in self._routes(documents):
                self._add(result, route, documents, indices, plain)
        except _Mismatch as error:
            result = self(block, plain=True)
            result.mismatch = error.number
            return result
        except _FatalError as error:
            result.fatal_error = (error.number, str(error))
        result.problems, result.unlisted = sorted(documents.problems), documents.unlisted
        return result

    def engine(self, language: str) -> RowEngine | None:
        """Fast engine for a language, or None."""
        if language not in self._engines:
            self._engines[language] = self.tokenizer.fast_engine(language)
        return self._engines[language]

    def segmenter(self, language: str) -> Segmenter | None:
        """Segmenter for a language, or None.

        Raises:
            UserError: its package is not installed, or the segmenter does not exist.
        """
        if language not in self._segmenters:
            name = resolve_segmenter(self.settings.segmenter, language)
            self._segmenters[language] = None if name is None else open_segmenter(name, language)
        return self._segmenters[language]

    def _routes(self, documents: Documents) -> list[tuple[Route, list[int]]]:
        """Datasets of a block, each with the indices of its documents."""
        if self.settings.language is not None:
            languages = {self.settings.language: list(range(len(documents.numbers)))}
        else:
            languages = {}
            for index, language in enumerate(documents.languages):
                languages.setdefault(language, []).append(index)
        return [
            (Route(column, language), indices)
            for column in range(len(documents.texts))
            for language, indices in languages.items()
        ]

    def _add(self, result: TokenisedBlock, route: Route, documents: Documents, indices: list[int], plain: bool) -> None:
        column = documents.texts[route.column]
        indices = [index for index in indices if column[index]]
        texts = [column[index] for index in indices]
        if not texts:
            return
        numbers = [documents.numbers[index] for index in indices]
        segmenter = self.segmenter(route.language)
        bits = None
        if segmenter is not None:
            ids, offsets, bits = self._encode_with_words(segmenter, texts, numbers, route.language)
        else:
            ids, offsets = self._encode(texts, numbers, route.language, plain)
        self._check_range(ids, offsets, numbers)
        lengths = numpy.diff(offsets)
        for index in numpy.flatnonzero(lengths == 0).tolist():
            documents.skip(numbers[index], -1, EMPTY)
        filled = lengths > 0
        if not filled.any():
            return
        result.counted_words += sum(len(text.split()) for text in texts[::_COUNTED_DOCUMENTS])
        result.counted_tokens += int(lengths[::_COUNTED_DOCUMENTS].sum())
        # After the last token of every non-empty document.
        ends = offsets[1:][filled]
        with_eod = numpy.insert(ids.astype(self._dtype), ends, self.tokenizer.eod_id)
        result.routes[route] = TokenisedTexts(
            with_eod,
            (lengths[filled] + 1).astype(numpy.int32),
            sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
            None if bits is None else numpy.insert(bits, ends, True),
        )

    def _encode(
        self, texts: list[str], numbers: list[int], language: str, plain: bool
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        engine = None if plain else self.engine(language)
        if engine is None:
            return self._encode_plain(texts, language)
        try:
            ids, offsets = engine(texts)
            wrong = self._compare(engine, texts, ids, offsets, language)
        except UnsuitableTextError:
            return self._encode_plain(texts, language)
        if wrong is not None:
            raise _Mismatch(numbers[wrong])
        return ids, offsets

    def _encode_plain(self, texts: list[str], language: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        with self._exclusive_if_large(max(map(len, texts))):
            return self.tokenizer.encode_rows(texts, language)

    @contextmanager
    def _exclusive_if_large(self, characters: int) -> Iterator[None]:
        if characters <= _LARGE_CHARACTERS:
            yield
            return
        with self._large_texts:
            yield
            release_memory()

    def _compare(
        self, engine: RowEngine, texts: list[str], ids: numpy.ndarray, offsets: numpy.ndarray, language: str
    ) -> int | None:
        """Index of the first document in a sample for which the engine's ids are wrong, or None."""
        steps = min(_COMPARED_DOCUMENTS, len(texts))
        for index in [(2 * step + 1) * len(texts) // (2 * steps) for step in range(steps)]:
            text = texts[index]
            found = ids[offsets[index] : offsets[index + 1]]
            if len(text) > _COMPARED_CHARACTERS:
                text = text[:_COMPARED_CHARACTERS]
                found = engine([text])[0]
            if not numpy.array_equal(found, self.tokenizer.encode_rows([text], language)[0]):
                return index
        return None

    def _encode_with_words(
        self, segmenter: Segmenter, texts: Sequence[str], numbers: Sequence[int], language: str
    ) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Returns ids, offsets, and for each id whether a word starts there."""
        rows: list[numpy.ndarray] = [numpy.empty(0, dtype=numpy.int64)]
        bits: list[numpy.ndarray] = [numpy.empty(0, dtype=numpy.bool_)]
        name = resolve_segmenter(self.settings.segmenter, language) or ""
        for text, number in zip(texts, numbers, strict=True):
            with self._exclusive_if_large(len(text)):
                ids, spans = self.tokenizer.encode_with_offsets(text, language)
            try:
                starts = checked_word_starts(segmenter, name, text, _NO_LOCATION)
            except UserError as error:
                raise _FatalError(number, str(error).removeprefix(f"{_NO_LOCATION}: ")) from error
            rows.append(numpy.array(ids, dtype=numpy.int64))
            bits.append(token_word_starts(text, spans, starts))
        offsets = numpy.cumsum([len(row) for row in rows], dtype=numpy.int64)
        return numpy.concatenate(rows), offsets, numpy.concatenate(bits)

    def _check_range(self, ids: numpy.ndarray, offsets: numpy.ndarray, numbers: Sequence[int]) -> None:
        """Checks ids before the cast to the file's dtype, in which a too large id would silently wrap."""
        if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < self.tokenizer.vocab_size):
            return
        wrong = int(numpy.flatnonzero((ids < 0) | (ids >= self.tokenizer.vocab_size))[0])
        index = int(numpy.searchsorted(offsets, wrong, side="right")) - 1
        raise _FatalError(
            numbers[index],
            f"tokenizer returned id {ids[wrong]}, expected 0 to {self.tokenizer.vocab_size - 1}; its files are "
            "inconsistent, save the tokenizer again",
        )


_NO_LOCATION = "here"


class _Mismatch(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _FatalError(Exception):
    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number
