"""Clone language of the English-Clone study: every ordinary id, shifted by the vocabulary size."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy
import orjson

from megatron_prealign.errors import UserError
from megatron_prealign.languages import check_language_code
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.gigatoken_engine import RowEngine

CLONE_FILE = "clone.json"
# Delimiters of decoded clone text; both are rare in any corpus.
CLONE_OPEN, CLONE_CLOSE = "⟦", "⟧"


class CloneTokenizer(Tokenizer):
    """Extends a base tokenizer of V ids to 2V ids: id + V is the clone of id.

    Both languages share the special tokens: their shifted ids are never produced, and also count as special. They may
    share the ids below `shared_ids`, too, as natural languages share parts of words: byte-level BPE has numbered bytes
    first, then the most frequent parts.
    """

    def __init__(self, base: Tokenizer, language: str, shared_ids: int = 0) -> None:
        self.base = base
        self.language = language
        self._shared = base.special_ids.union(range(shared_ids))
        self.path = base.path
        self.vocab_size = 2 * base.vocab_size
        self.eod_id = base.eod_id
        self.library = base.library
        self.special_ids = base.special_ids | {index + base.vocab_size for index in base.special_ids}
        content = f"{base.fingerprint}\nclone {language}" + (f" {shared_ids}" if shared_ids else "")
        self.fingerprint = "sha256:" + hashlib.sha256(content.encode()).hexdigest()

    def _shift(self, rows: list[list[int]], language: str | None) -> list[list[int]]:
        if language != self.language:
            return rows
        shared, offset = self._shared, self.base.vocab_size
        return [[index if index in shared else index + offset for index in row] for row in rows]

    def _shift_array(self, ids: numpy.ndarray, language: str | None) -> numpy.ndarray:
        if language != self.language:
            return ids
        shared = numpy.isin(ids, list(self._shared))
        return numpy.where(shared, ids, ids + self.base.vocab_size).astype(ids.dtype)

    def encode(self, text: str, language: str | None = None) -> list[int]:
        return self._shift([self.base.encode(text)], language)[0]

    def encode_batch(self, texts: Sequence[str], language: str | None = None) -> list[list[int]]:
        return self._shift(self.base.encode_batch(texts), language)

    def encode_rows(self, texts: Sequence[str], language: str | None = None) -> tuple[numpy.ndarray, numpy.ndarray]:
        ids, offsets = self.base.encode_rows(texts)
        return self._shift_array(ids, language), offsets

    def fast_engine(self, language: str | None = None) -> RowEngine | None:
        engine = self.base.fast_engine()
        if engine is None or language != self.language:
            return engine

        def encode(texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
            ids, offsets = engine(texts)
            return self._shift_array(ids, language), offsets

        return encode

    def encode_with_offsets(self, text: str, language: str | None = None) -> tuple[list[int], numpy.ndarray]:
        ids, spans = self.base.encode_with_offsets(text)
        return self._shift([ids], language)[0], spans

    def encode_words(
        self, words: Sequence[str], language: str | None = None, word_initial: bool = True
    ) -> list[list[int]]:
        return self._shift(self.base.encode_words(words, None, word_initial), language)

    def encode_word_rows(
        self, words: Sequence[str], language: str | None = None, word_initial: bool = True
    ) -> tuple[numpy.ndarray, numpy.ndarray]:
        ids, offsets = self.base.encode_word_rows(words, None, word_initial)
        self.word_encoder = self.base.word_encoder
        return self._shift_array(ids, language), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes to base text; each run of clone ids is enclosed in `CLONE_OPEN` and `CLONE_CLOSE`."""
        offset = self.base.vocab_size
        parts = []
        for cloned, run in groupby(map(int, ids), key=lambda index: index >= offset):
            text = self.base.decode([index % offset for index in run])
            parts.append(CLONE_OPEN + text + CLONE_CLOSE if cloned else text)
        return "".join(parts)

    def decode_word(self, ids: Sequence[int]) -> str:
        # A word may mix cloned and shared ids: brackets inside would split it.
        return self.base.decode_word([int(index) % self.base.vocab_size for index in ids])

    def word_boundaries(self) -> numpy.ndarray:
        return numpy.tile(self.base.word_boundaries(), 2)


@dataclass(frozen=True)
class CloneLanguage:
    """Content of `clone.json`."""

    language: str
    """Code of the clone language."""
    shared_ids: int = 0
    """Ids below this one are the same in both languages."""


def load_clone(path: Path) -> CloneLanguage:
    """Reads a `clone.json`.

    Raises:
        UserError: the file is not `{"language": "<code>"}`, with `"shared_ids": <number>` or without.
    """
    expected = 'expected {"language": "en_clone"}'
    try:
        data = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"{path}: invalid JSON ({error}), {expected}") from error
    language = data.get("language") if isinstance(data, dict) else None
    if not isinstance(language, str) or not language:
        raise UserError(f"{path}: language is missing, {expected}")
    shared = data.get("shared_ids", 0)
    if type(shared) is not int or shared < 0:
        raise UserError(f"{path}: shared_ids is {shared}, expected a number of ids; correct it or remove the field")
    return CloneLanguage(check_language_code(language, f"{path}: language"), shared)


def save_clone(directory: Path, clone: CloneLanguage) -> None:
    """Makes the tokenizer in `directory` a clone tokenizer by writing `clone.json`."""
    content = {"language": clone.language, **({"shared_ids": clone.shared_ids} if clone.shared_ids else {})}
    (directory / CLONE_FILE).write_bytes(orjson.dumps(content) + b"\n")
