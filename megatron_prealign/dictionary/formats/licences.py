"""Finds the licence statement in a dictionary's header."""

import re

MAX_CHARACTERS = 300
_LICENCE = re.compile(r"licen[cs]|copyright|public domain|creative commons|\bGPL\b|\bCC[- ]BY|©", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!])\s+(?=[A-Z])")


def find_licence(text: str) -> str:
    """Returns the licence sentences of the first paragraph that has any, at most 300 characters; "" if none does.

    This only identifies the licence; the licence itself must be read by a person.
    """
    for paragraph in re.split(r"\n\s*\n", text):
        sentences = _SENTENCE_END.split(" ".join(paragraph.split()))
        matches = [sentence for sentence in sentences if _LICENCE.search(sentence)]
        if matches:
            return shorten(" ".join(matches))
    return ""


def shorten(text: str) -> str:
    """Returns `text` on one line, truncated to 300 characters."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"
