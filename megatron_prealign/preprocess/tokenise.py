"""Turns the documents of a block into token ids, with a fast engine that is checked on a sample of every block."""

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

# Of each block and dataset so many documents, each up to so many characters, are encoded a second time by the plain
# tokenizer: some 0.3 % of the text, a few percent of the time beside an engine ten times as fast.
_COMPARED_DOCUMENTS = 3
_COMPARED_CHARACTERS = 2_000
# The tokenizers library takes up to 160 bytes of memory for each byte of a text: 1.6 GB for one of 10 MB that gave 6.8
# million tokens, of which the C library would keep 1.1 GB.
_LARGE_CHARACTERS = 4 << 20
# Counting words costs as much as parsing JSON; tokens per word needs but a sample.
_COUNTED_DOCUMENTS = 16


class Route(NamedTuple):
    """Which dataset a text belongs to."""

    column: int
    """Of `Documents.texts`."""
    language: str


@dataclass
class TokenisedTexts:
    """What one block adds to one dataset."""

    ids: numpy.ndarray
    """All documents behind each other, each with its end-of-document id, in the dtype of the file."""
    lengths: numpy.ndarray
    """int32 [documents], tokens of each."""
    text_bytes: int
    """UTF-8 bytes of the text."""
    word_starts: numpy.ndarray | None
    """bool, one for each of `ids`; None without a segmenter."""


@dataclass
class TokenisedBlock:
    """What a worker hands back."""

    routes: dict[Route, TokenisedTexts] = field(default_factory=dict)
    lines: int = 0
    """Lines or rows of the block."""
    problems: list[tuple[int, int, str]] = field(default_factory=list)
    """As in `Documents`."""
    unlisted: int = 0
    """As in `Documents`."""
    fault: tuple[int, str] | None = None
    """A line and what the tokenizer or the segmenter did wrong there, which nobody may pass over."""
    mismatch: int | None = None
    """A line whose ids the fast engine got wrong; the plain tokenizer made all of this block."""
    counted_words: int = 0
    """Words between white space in a sample of the documents."""
    counted_tokens: int = 0
    """Tokens of the same documents."""


@dataclass(frozen=True)
class TokeniserSettings:
    """What a worker process needs to know."""

    tokenizer: str
    fields: Fields
    limits: Limits
    language: str | None
    """Language of all documents; None if it stands in each."""
    segmenter: str | None
    """A name for `segmenters.open_segmenter`, `auto` or None."""


class BlockTokeniser:
    """Tokenises one block after the other."""

    def __init__(
        self,
        settings: TokeniserSettings,
        tokenizer: Tokenizer | None = None,
        large_texts: AbstractContextManager[object] | None = None,
    ) -> None:
        """Opens what the settings name, unless the tokenizer is given. `large_texts` is a lock that all workers share:
        one of them at a time encodes a large text by the tokenizer's own library."""
        self.settings = settings
        self._large_texts = nullcontext() if large_texts is None else large_texts
        self.tokenizer = load_tokenizer(Path(settings.tokenizer)) if tokenizer is None else tokenizer
        self._dtype = token_dtype(self.tokenizer.vocab_size)
        self._engines: dict[str, RowEngine | None] = {}
        self._segmenters: dict[str, Segmenter | None] = {}
        if settings.language is not None:
            self.segmenter(settings.language)

    def __call__(self, block: Block, plain: bool) -> TokenisedBlock:
        """The tokens of a block; with `plain`, by the tokenizer's own library."""
        documents = parse_block(block, self.settings.fields, self.settings.limits)
        result = TokenisedBlock(lines=documents.lines)
        try:
            for route, places in self._routes(documents):
                self._add(result, route, documents, places, plain)
        except _Mismatch as error:
            result = self(block, plain=True)
            result.mismatch = error.number
            return result
        except _Fault as error:
            result.fault = (error.number, str(error))
        result.problems, result.unlisted = sorted(documents.problems), documents.unlisted
        return result

    def engine(self, language: str) -> RowEngine | None:
        """The fast engine for a language; None where there is none."""
        if language not in self._engines:
            self._engines[language] = self.tokenizer.fast_engine(language)
        return self._engines[language]

    def segmenter(self, language: str) -> Segmenter | None:
        """Who marks the words of a language; None for nobody.

        Raises:
            UserError: its package is missing, or there is no such segmenter.
        """
        if language not in self._segmenters:
            name = resolve_segmenter(self.settings.segmenter, language)
            self._segmenters[language] = None if name is None else open_segmenter(name, language)
        return self._segmenters[language]

    def _routes(self, documents: Documents) -> list[tuple[Route, list[int]]]:
        """The datasets of a block, each with its documents."""
        if self.settings.language is not None:
            languages = {self.settings.language: list(range(len(documents.numbers)))}
        else:
            languages = {}
            for place, language in enumerate(documents.languages):
                languages.setdefault(language, []).append(place)
        return [
            (Route(column, language), places)
            for column in range(len(documents.texts))
            for language, places in languages.items()
        ]

    def _add(self, result: TokenisedBlock, route: Route, documents: Documents, places: list[int], plain: bool) -> None:
        column = documents.texts[route.column]
        places = [place for place in places if column[place]]
        texts = [column[place] for place in places]
        if not texts:
            return
        numbers = [documents.numbers[place] for place in places]
        segmenter = self.segmenter(route.language)
        bits = None
        if segmenter is not None:
            ids, offsets, bits = self._encode_marked(segmenter, texts, numbers, route.language)
        else:
            ids, offsets = self._encode(texts, numbers, route.language, plain)
        self._check_range(ids, offsets, numbers)
        lengths = numpy.diff(offsets)
        for place in numpy.flatnonzero(lengths == 0).tolist():
            documents.skip(numbers[place], -1, EMPTY)
        filled = lengths > 0
        if not filled.any():
            return
        result.counted_words += sum(len(text.split()) for text in texts[::_COUNTED_DOCUMENTS])
        result.counted_tokens += int(lengths[::_COUNTED_DOCUMENTS].sum())
        # Behind the last token of every document that has any.
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
        with self._alone_if_large(max(map(len, texts))):
            return self.tokenizer.encode_rows(texts, language)

    @contextmanager
    def _alone_if_large(self, characters: int) -> Iterator[None]:
        if characters <= _LARGE_CHARACTERS:
            yield
            return
        with self._large_texts:
            yield
            release_memory()

    def _compare(
        self, engine: RowEngine, texts: list[str], ids: numpy.ndarray, offsets: numpy.ndarray, language: str
    ) -> int | None:
        """The first document of a sample that the engine got wrong."""
        steps = min(_COMPARED_DOCUMENTS, len(texts))
        for place in [(2 * step + 1) * len(texts) // (2 * steps) for step in range(steps)]:
            text = texts[place]
            found = ids[offsets[place] : offsets[place + 1]]
            if len(text) > _COMPARED_CHARACTERS:
                text = text[:_COMPARED_CHARACTERS]
                found = engine([text])[0]
            if not numpy.array_equal(found, self.tokenizer.encode_rows([text], language)[0]):
                return place
        return None

    def _encode_marked(
        self, segmenter: Segmenter, texts: Sequence[str], numbers: Sequence[int], language: str
    ) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        """Ids, offsets, and where words start among the ids."""
        rows: list[numpy.ndarray] = [numpy.empty(0, dtype=numpy.int64)]
        bits: list[numpy.ndarray] = [numpy.empty(0, dtype=numpy.bool_)]
        name = resolve_segmenter(self.settings.segmenter, language) or ""
        for text, number in zip(texts, numbers, strict=True):
            with self._alone_if_large(len(text)):
                ids, spans = self.tokenizer.encode_with_offsets(text, language)
            try:
                starts = checked_word_starts(segmenter, name, text, _NO_PLACE)
            except UserError as error:
                raise _Fault(number, str(error).removeprefix(f"{_NO_PLACE}: ")) from error
            rows.append(numpy.array(ids, dtype=numpy.int64))
            bits.append(token_word_starts(text, spans, starts))
        offsets = numpy.cumsum([len(row) for row in rows], dtype=numpy.int64)
        return numpy.concatenate(rows), offsets, numpy.concatenate(bits)

    def _check_range(self, ids: numpy.ndarray, offsets: numpy.ndarray, numbers: Sequence[int]) -> None:
        """Checks ids before they are cast to the file's dtype, where one too large would silently become another."""
        if not len(ids) or (int(ids.min()) >= 0 and int(ids.max()) < self.tokenizer.vocab_size):
            return
        wrong = int(numpy.flatnonzero((ids < 0) | (ids >= self.tokenizer.vocab_size))[0])
        place = int(numpy.searchsorted(offsets, wrong, side="right")) - 1
        raise _Fault(
            numbers[place],
            f"the tokenizer gave the id {ids[wrong]}, expected 0 to {self.tokenizer.vocab_size - 1}; "
            "its files do not fit together, save the tokenizer again",
        )


_NO_PLACE = "here"


class _Mismatch(Exception):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Fault(Exception):
    def __init__(self, number: int, why: str) -> None:
        super().__init__(why)
        self.number = number
