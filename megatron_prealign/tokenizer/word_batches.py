"""Encodes large batches of words as lines of longer texts, for byte-level BPE tokenizers.

The call overhead of the tokenizers library is several times the cost of encoding a word. So about a thousand words are
joined to one text of lines, encoded by `gigatoken` if it is installed and supports the tokenizer, else by `tokenizers`,
and the result is split at the ids of the line breaks. The ids equal those of the single words if no token crosses a
line break (checked by the number of line breaks) and pre-tokenisation does not look across one (checked on a sample).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from megatron_prealign.tokenizer.gigatoken_engine import engine_for_definition

if TYPE_CHECKING:
    import tokenizers

SEPARATOR = "\n"
_TEXT_CHARACTERS = 1 << 14
# Enough for all cores, while the arrays of a call stay small.
_TEXTS_A_CALL = 256
_RANDOM_WORDS = 128
_CHARACTER_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")

# Texts -> their concatenated ids.
_Engine = Callable[[list[str]], numpy.ndarray]


class BatchWordEncoder:
    """Encodes batches of words with one tokenizer and one `prefix` before each word."""

    def __init__(
        self,
        tokenizer: "tokenizers.Tokenizer",
        definition: dict[str, Any],
        prefix: str,
        plain: Callable[[Sequence[str]], list[list[int]]],
    ) -> None:
        """Takes the tokenizer, its JSON definition, and `plain`, which encodes words one by one."""
        self._prefix, self._plain = prefix, plain
        self._seen = numpy.zeros(0x110000, dtype=bool)
        self._seen[:128] = True
        # After a letter, because some tokenizers prepend a space to a text.
        letter, line = (tokenizer.encode(text, add_special_tokens=False).ids for text in ("a", f"a{SEPARATOR}"))
        self._separator = line[-1] if line[:-1] == letter else -1
        self._engines = list(_engines(tokenizer, definition)) if _splits_lines(definition) else []

    def encode(self, words: Sequence[str]) -> tuple[numpy.ndarray, numpy.ndarray, str] | None:
        """Returns ids, start offsets and the name of the encoder; None if the words must be encoded one by one."""
        if self._separator < 0 or not words:
            return None
        between = SEPARATOR + self._prefix
        text = f"{self._prefix}{between.join(words)}{SEPARATOR}"
        if text.count(SEPARATOR) != len(words) or f"{between}{SEPARATOR}" in SEPARATOR + text:
            # A word contains a line break or is empty.
            return None
        while self._engines:
            name, engine = self._engines[0]
            rows = self._encode_lines(engine, text, len(words))
            if rows is not None and self._is_correct(words, text, *rows):
                return *rows, name
            # Do not use an engine again after it failed.
            del self._engines[0]
            self._seen[128:] = False
        return None

    def _encode_lines(self, engine: _Engine, text: str, lines: int) -> tuple[numpy.ndarray, numpy.ndarray] | None:
        parts = [numpy.zeros(0, dtype=numpy.int32)]
        for texts in _batches(text):
            try:
                parts.append(engine(texts))
            except Exception:  # gigatoken raises many exception types for unsupported input.
                return None
        ids = numpy.concatenate(parts)
        ends = ids == self._separator
        breaks = numpy.flatnonzero(ends)
        offsets = numpy.zeros(len(breaks) + 1, dtype=numpy.int64)
        offsets[1:] = breaks - numpy.arange(len(breaks))
        return (ids[~ends], offsets) if len(breaks) == lines else None

    def _is_correct(self, words: Sequence[str], text: str, tokens: numpy.ndarray, offsets: numpy.ndarray) -> bool:
        """Compares a sample with the words encoded one by one."""
        sample = self._sample(text, len(words))
        rows = self._plain([words[index] for index in sample])
        return all(
            tokens[offsets[index] : offsets[index + 1]].tolist() == row for index, row in zip(sample, rows, strict=True)
        )

    def _sample(self, text: str, lines: int) -> list[int]:
        """Returns random lines, plus the first line with every new non-ASCII character: libraries differ mostly in
        their Unicode support."""
        chosen = set(numpy.random.default_rng(lines).integers(lines, size=_RANDOM_WORDS).tolist())
        if not text.isascii():
            codes = numpy.frombuffer(text.encode("utf-32-le"), dtype="<u4")
            places = numpy.flatnonzero(~self._seen[codes])
            new, first = numpy.unique(codes[places], return_index=True)
            self._seen[new] = True
            breaks = numpy.flatnonzero(codes == ord(SEPARATOR))
            chosen.update(numpy.searchsorted(breaks, places[first]).tolist())
        return sorted(chosen)


def _batches(text: str) -> Iterator[list[str]]:
    """Yields lists of texts for one call, each text with complete lines and about `_TEXT_CHARACTERS` characters."""
    texts, begin = [], 0
    while begin < len(text):
        end = text.index(SEPARATOR, min(begin + _TEXT_CHARACTERS, len(text) - 1)) + 1
        texts.append(text[begin:end])
        begin = end
        if len(texts) == _TEXTS_A_CALL or begin == len(text):
            yield texts
            texts = []


def _splits_lines(definition: dict[str, Any]) -> bool:
    """Whether a tokenizer can keep line breaks separate: byte-level BPE, normalised character by character."""
    normalizer = definition.get("normalizer") or {}
    normalizers = normalizer.get("normalizers", [normalizer]) if normalizer else []
    pre_tokenizer = definition.get("pre_tokenizer") or {}
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return (
        definition["model"].get("type") == "BPE"
        and all(part.get("type") in _CHARACTER_NORMALIZERS for part in normalizers)
        and any(part.get("type") == "ByteLevel" for part in parts)
    )


def _engines(tokenizer: "tokenizers.Tokenizer", definition: dict[str, Any]) -> Iterator[tuple[str, _Engine]]:
    engine = engine_for_definition(definition)
    if engine is not None:
        yield "gigatoken", lambda texts: engine(texts)[0].astype(numpy.int32)

    def encode(texts: list[str]) -> numpy.ndarray:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return numpy.concatenate([numpy.array(encoding.ids, dtype=numpy.int32) for encoding in encodings])

    yield "tokenizers", encode
