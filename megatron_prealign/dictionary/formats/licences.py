"""Finds the licence in what a dictionary's header tells about it."""

import re

MAX_CHARACTERS = 300
_LICENCE = re.compile(r"licen[cs]|copyright|public domain|creative commons|\bGPL\b|\bCC[- ]BY|©", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!])\s+(?=[A-Z])")


def licence_in(text: str) -> str:
    """What the first paragraph of `text` that speaks of a licence says of it, at most 300 characters; "" if none does.

    A person must read the licence itself; this is to tell which one.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        sentences = _SENTENCE_END.split(" ".join(paragraph.split()))
        found = [sentence for sentence in sentences if _LICENCE.search(sentence)]
        if found:
            return shorten(" ".join(found))
    return ""


def shorten(text: str) -> str:
    """`text` on one line, cut at 300 characters."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
