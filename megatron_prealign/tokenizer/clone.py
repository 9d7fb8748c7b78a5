"""Clone language of the English-Clone study: every ordinary id, shifted by the vocabulary size."""

import hashlib
from collections.abc import Sequence
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

    Both languages share the special tokens: their shifted ids are never produced, and also count as special.
    """

    def __init__(self, base: Tokenizer, language: str) -> None:
        self.base = base
        self.language = language
        self.path = base.path
        self.vocab_size = 2 * base.vocab_size
        self.eod_id = base.eod_id
        self.library = base.library
        self.special_ids = base.special_ids | {index + base.vocab_size for index in base.special_ids}
        content = f"{base.fingerprint}\nclone {language}"
        self.fingerprint = "sha256:" + hashlib.sha256(content.encode()).hexdigest()

    def _shift(self, rows: list[list[int]], language: str | None) -> list[list[int]]:
        if language != self.language:
            return rows
        special, offset = self.base.special_ids, self.base.vocab_size
        return [[index if index in special else index + offset for index in row] for row in rows]

    def _shift_array(self, ids: numpy.ndarray, language: str | None) -> numpy.ndarray:
        if language != self.language:
            return ids
        special = numpy.isin(ids, list(self.base.special_ids))
        return numpy.where(special, ids, ids + self.base.vocab_size).astype(ids.dtype)

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

    def word_boundaries(self) -> numpy.ndarray:
        return numpy.tile(self.base.word_boundaries(), 2)


def load_clone_language(path: Path) -> str:
    """Reads the language from a `clone.json`.

    Raises:
        UserError: the file is not `{"language": "<code>"}`.
    """
    try:
        data = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f'{path}: invalid JSON ({error}), expected {{"language": "en_clone"}}') from error
    language = data.get("language") if isinstance(data, dict) else None
    if not isinstance(language, str) or not language:
        raise UserError(f'{path}: language is missing, expected {{"language": "en_clone"}}')
    return check_language_code(language, f"{path}: language")


def save_clone_language(directory: Path, language: str) -> None:
    """Makes the tokenizer in `directory` a clone tokenizer by writing `clone.json`."""
    (directory / CLONE_FILE).write_bytes(orjson.dumps({"language": language}) + b"\n")
