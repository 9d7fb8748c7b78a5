"""gigatoken, a much faster engine for the BPE of a tokenizer.json; never needed, and never trusted unchecked.

It also takes sentencepiece BPE models, but gave other ids for 14 of 6,000 documents and was no faster (gigatoken
0.10.0, sentencepiece 0.2.3): those stay with sentencepiece.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy
import orjson

RowEngine = Callable[[list[str]], tuple[numpy.ndarray, numpy.ndarray]]
"""Texts -> the ids of all of them, one text behind the other, uint32 [tokens]; where each begins, int64 [texts + 1]."""


_PREFIX_CHARACTERS = 3
# gigatoken 0.10.0 keeps every word it has ever seen: 1.8 GB after 216 MB of random words, and a new tokenizer in its
# place gives that back within 15 to 40 ms. So much memory holds about a million different words.
_LARGEST_GROWTH_BYTES = 128 << 20


class UnsuitableTextError(Exception):
    """The engine would give other ids than the tokenizer's own library for a text."""


class _Names:
    """Finds any of many names in a text: some tokenizers have thousands of added tokens, most with one beginning."""

    def __init__(self, names: list[str]) -> None:
        self._lengths: dict[str, set[int]] = {}
        for name in names:
            self._lengths.setdefault(name[:_PREFIX_CHARACTERS], set()).add(len(name))
        self._names = set(names)

    def stand_in(self, text: str) -> bool:
        for prefix, lengths in self._lengths.items():
            at = text.find(prefix)
            while at >= 0:
                if any(text[at : at + length] in self._names for length in lengths):
                    return True
                at = text.find(prefix, at + 1)
        return False


def engine_for_definition(definition: dict[str, Any]) -> RowEngine | None:
    """The engine for the contents of a `tokenizer.json`; None where gigatoken is missing or does not take it.

    It raises `UnsuitableTextError` for texts with an added token in them.
    """
    # The names of special tokens are plain text in our encoding.
    added_tokens = _Names([token["content"] for token in definition.get("added_tokens") or [] if not token["special"]])
    try:
        return _Engine(orjson.dumps(definition | {"added_tokens": []}), added_tokens)
    except Exception:  # It raises many kinds for what it does not support, other versions others.
        return None


class _Engine:
    """Encodes, and forgets what it keeps of words when that has become too much."""

    def __init__(self, definition: bytes, added_tokens: _Names) -> None:
        self._definition, self._added_tokens = definition, added_tokens
        self._renew()

    def __call__(self, texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        if self._added_tokens.stand_in("\0".join(texts)):
            raise UnsuitableTextError
        ids, offsets = _arrays(self._tokenizer.encode_batch(texts))
        if _resident_bytes() > self._largest:
            self._renew()
        return ids, offsets

    def _renew(self) -> None:
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_json(self._definition)
        self._largest = _resident_bytes() + _LARGEST_GROWTH_BYTES


def _arrays(rows: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Ids and offsets of gigatoken's answer: an awkward array, or a list where awkward does not run (numpy 1.26)."""
    if isinstance(rows, list):
        offsets = numpy.zeros(len(rows) + 1, dtype=numpy.int64)
        numpy.cumsum([len(row) for row in rows], out=offsets[1:])
        return numpy.fromiter(chain.from_iterable(rows), numpy.uint32, int(offsets[-1])), offsets
    offsets = numpy.asarray(rows.layout.offsets.data, dtype=numpy.int64)
    return numpy.asarray(rows.layout.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]


def _resident_bytes() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
