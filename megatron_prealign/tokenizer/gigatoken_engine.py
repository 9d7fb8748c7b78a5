"""gigatoken, a much faster engine for BPE tokenizers in tokenizer.json; optional, and its results are always checked.

It also supports sentencepiece BPE models, but produced different ids for 14 of 6,000 documents and was no faster
(gigatoken 0.10.0, sentencepiece 0.2.3), so it is not used for them.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy
import orjson

RowEngine = Callable[[list[str]], tuple[numpy.ndarray, numpy.ndarray]]
"""Texts -> concatenated ids, uint32 [tokens], and start offsets, int64 [texts + 1]."""


_PREFIX_CHARACTERS = 3
# gigatoken 0.10.0 caches every word it has seen: 1.8 GB after 216 MB of random words. Replacing the tokenizer frees
# that memory in 15 to 40 ms. This limit is enough for about a million distinct words.
_LARGEST_GROWTH_BYTES = 128 << 20


class UnsuitableTextError(Exception):
    """The engine would produce different ids than the tokenizer's own library for a text."""


class _NameMatcher:
    """Finds any of many names in a text: some tokenizers have thousands of added tokens, most with a common prefix."""

    def __init__(self, names: list[str]) -> None:
        self._lengths: dict[str, set[int]] = {}
        for name in names:
            self._lengths.setdefault(name[:_PREFIX_CHARACTERS], set()).add(len(name))
        self._names = set(names)

    def occurs_in(self, text: str) -> bool:
        for prefix, lengths in self._lengths.items():
            at = text.find(prefix)
            while at >= 0:
                if any(text[at : at + length] in self._names for length in lengths):
                    return True
                at = text.find(prefix, at + 1)
        return False


def engine_for_definition(definition: dict[str, Any]) -> RowEngine | None:
    """Returns the engine for a `tokenizer.json`; None if gigatoken is not installed or does not support it.

    The engine raises `UnsuitableTextError` for texts that contain an added token.
    """
    # Names of special tokens are encoded as plain text.
    added_tokens = _NameMatcher(
        [token["content"] for token in definition.get("added_tokens") or [] if not token["special"]]
    )
    try:
        return _Engine(orjson.dumps(definition | {"added_tokens": []}), added_tokens)
    except Exception:  # gigatoken raises many exception types for unsupported tokenizers, depending on its version.
        return None


class _Engine:
    """Encodes texts, and clears the word cache when it exceeds a memory limit."""

    def __init__(self, definition: bytes, added_tokens: _NameMatcher) -> None:
        self._definition, self._added_tokens = definition, added_tokens
        self._reset()

    def __call__(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        if self._added_tokens.occurs_in("\0".join(texts)):
            raise UnsuitableTextError
        ids, offsets = _arrays(self._tokenizer.encode_batch(texts))
        if _resident_bytes() > self._largest:
            self._reset()
        return ids, offsets

    def _reset(self) -> None:
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_json(self._definition)
        self._largest = _resident_bytes() + _LARGEST_GROWTH_BYTES


def _arrays(rows: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Ids and offsets of gigatoken's result: an awkward array, or a list if awkward is not usable (numpy 1.26)."""
    if isinstance(rows, list):
        offsets = numpy.zeros(len(rows) + 1, dtype=numpy.int64)
        numpy.cumsum([len(row) for row in rows], out=offsets[1:])
        return numpy.fromiter(chain.from_iterable(rows), numpy.uint32, int(offsets[-1])), offsets
    offsets = numpy.asarray(rows.layout.offsets.data, dtype=numpy.int64)
    return numpy.asarray(rows.layout.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
