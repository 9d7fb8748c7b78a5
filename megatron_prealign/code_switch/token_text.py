"""Text of stretches of tokens, so that together they read like the whole."""

from collections.abc import Sequence

from megatron_prealign.tokenizer.base import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for a part of a character."""


class TokenText:
    """Decodes stretches of tokens from inside a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # decoders take the space off the first word of a text: a letter in front keeps it
        self._letter = tokenizer.encode_word("a", word_initial=False)
        self._letter_text = tokenizer.decode(self._letter)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens that stand inside a text, with the space in front."""
        decoded = self._tokenizer.decode([*self._letter, *tokens])
        if decoded.startswith(self._letter_text):
            return decoded[len(self._letter_text) :]
        return self._tokenizer.decode(tokens)

    def pieces(self, stretches: Sequence[Sequence[int]]) -> list[str]:
        """The texts of stretches that follow each other.

        A character whose bytes two stretches share goes to the later one. What is cut off at either end of the whole
        is left out.
        """
        pieces: list[str] = []
        open_tokens: list[int] = []
        given = ""
        for number, stretch in enumerate(stretches):
            open_tokens += stretch
            whole = self.text(open_tokens)
            # the missing bytes may follow
            ready = whole.rstrip(INCOMPLETE)
            incomplete = ready != whole and number + 1 < len(stretches)
            pieces.append((ready if incomplete else whole)[len(given) :])
            open_tokens, given = (open_tokens, ready) if incomplete else ([], "")
        for number, piece in enumerate(pieces):
            pieces[number] = piece.lstrip(INCOMPLETE)
            if pieces[number]:
                break
        for number in range(len(pieces) - 1, -1, -1):
            pieces[number] = pieces[number].rstrip(INCOMPLETE)
            if pieces[number]:
                break
        return pieces
