"""Decodes consecutive token spans so that their texts join to the full text."""

from collections.abc import Sequence

from megatron_prealign.tokenizer.base import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Decoded text of an incomplete character."""


class TokenText:
    """Decodes token spans from within a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # decoders strip the space before the first word of a text; a leading letter keeps it
        self._letter = tokenizer.encode_word("a", word_initial=False)
        self._letter_text = tokenizer.decode(self._letter)

    def text(self, tokens: Sequence[int]) -> str:
        """Text of tokens from within a text, with the leading space."""
        decoded = self._tokenizer.decode([*self._letter, *tokens])
        if decoded.startswith(self._letter_text):
            return decoded[len(self._letter_text) :]
        return self._tokenizer.decode(tokens)

    def pieces(self, spans: Sequence[Sequence[int]]) -> list[str]:
        """Texts of consecutive token spans.

        A character whose bytes are split over two spans belongs to the later one. Characters that are incomplete at
        either end of the sequence are dropped.
        """
        pieces: list[str] = []
        open_tokens: list[int] = []
        emitted = ""
        for index, span in enumerate(spans):
            open_tokens += span
            decoded = self.text(open_tokens)
            # the missing bytes may follow
            complete = decoded.rstrip(INCOMPLETE)
            incomplete = complete != decoded and index + 1 < len(spans)
            pieces.append((complete if incomplete else decoded)[len(emitted) :])
            open_tokens, emitted = (open_tokens, complete) if incomplete else ([], "")
        for index, piece in enumerate(pieces):
            pieces[index] = piece.lstrip(INCOMPLETE)
            if pieces[index]:
                break
        for index in range(len(pieces) - 1, -1, -1):
            pieces[index] = pieces[index].rstrip(INCOMPLETE)
            if pieces[index]:
                break
        return pieces
