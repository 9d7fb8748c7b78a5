"""gigatoken, a much faster engine for the BPE of a tokenizer.json; never needed, and never trusted unchecked.

It also takes sentencepiece BPE models, but gave other ids for 14 of 6,000 documents and was no faster (gigatoken
0.10.0, sentencepiece 0.2.3): those stay with sentencepiece.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy
import orjson

RowEngine = Callable[[list[str]], tuple[numpy.ndarray, numpy.ndarray]]
"""Texts -> the ids of all of them, one text behind the other, uint32 [tokens]; where each begins, int64 [texts + 1]."""


_PREFIX_CHARACTERS = 3


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
    data = copy.deepcopy(definition)
    # The names of special tokens are plain text in our encoding.
    added_tokens = _Names([token["content"] for token in data.get("added_tokens") or [] if not token["special"]])
    data["added_tokens"] = []
    try:
        import gigatoken

        tokenizer = gigatoken.Tokenizer.from_json(orjson.dumps(data))
    except Exception:  # It raises many kinds for what it does not support, other versions others.
        return None

    def encode(texts: list[str]) -> tuple[numpy.ndarray, numpy.ndarray]:
        if added_tokens.stand_in("\0".join(texts)):
            raise UnsuitableTextError
        layout = tokenizer.encode_batch(texts).layout
        offsets = numpy.asarray(layout.offsets.data, dtype=numpy.int64)
        return numpy.asarray(layout.content.data)[offsets[0] : offsets[-1]], offsets - offsets[0]

    return encode
