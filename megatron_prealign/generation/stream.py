"""Text of a growing list of token ids. Imports no torch."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"
"""Decoded from bytes that are no character, or not yet."""
# More tokens than a character has bytes: these bytes are no character, and trying again for each token would take
# quadratic time.
_SOON = 8


class StreamDecoder:
    """Decodes the tokens of one text while they are generated. Each call decodes the last few tokens, not the text.

    They are decoded together with those before them: a tokenizer removes the space at the start of what it decodes.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        """
        Args:
            decode: Text of token ids, without special tokens.
        """
        self._decode = decode
        # Tokens [before, done) were the last text that was returned; nothing of those from `done` on was.
        self._before = self._done = 0
        self._waits_since: int | None = None
        self._retry_at = 0

    def new_text(self, ids: Sequence[int]) -> str:
        """Returns the text that was added since the last call; empty while its last character is incomplete.

        Args:
            ids: All tokens so far.
        """
        if len(ids) < self._retry_at:
            return ""
        known = self._decode(ids[self._before : self._done])
        text = self._decode(ids[self._before :])
        if text.endswith(_REPLACEMENT) or text == known or not text.startswith(known):
            self._waits_since = self._waits_since or len(ids)
            waited = len(ids) - self._waits_since
            self._retry_at = len(ids) + (1 if waited < _SOON else waited)
            return ""
        self._before, self._done, self._waits_since = self._done, len(ids), None
        return text[len(known) :]
