"""Word boundary flags of a vocabulary: one byte per id.

Bit 0 (`STARTS_WORD`): a word boundary before the token. Bit 1 (`ENDS_WORD`): a word boundary after it. Position i of a
sequence starts a word if and only if bit 0 of token i or bit 1 of token i - 1 is set.
"""

import unicodedata
from collections.abc import Sequence

import numpy

STARTS_WORD = 1
ENDS_WORD = 2
BOTH = STARTS_WORD | ENDS_WORD


def is_letter(character: str) -> bool:
    """Whether a character is a letter or a combining mark (Unicode categories L* and M*)."""
    return unicodedata.category(character)[0] in "LM"


def text_flags(text: str) -> int:
    """Returns the flags of a token with known text; the space marker counts as a space.

    A token without text (an unused id) separates words like a special token.
    """
    if not text:
        return BOTH
    return STARTS_WORD * (not is_letter(text[0])) | ENDS_WORD * (not is_letter(text[-1]))


def bytes_flags(data: bytes) -> int:
    """Returns the flags of a token with known UTF-8 bytes, which may start or end inside a character.

    Bytes of an incomplete character count as a letter: most of them are, and splitting a word would lose it.
    """
    if not data:
        return BOTH
    first, last = _first_character(data), _last_character(data)
    starts = first is not None and not is_letter(first)
    ends = last is not None and not is_letter(last)
    return STARTS_WORD * starts | ENDS_WORD * ends


def _character_length(lead: int) -> int:
    """Length in bytes of the UTF-8 character that starts with `lead`; 0 if `lead` is not a start byte."""
    if lead < 0x80:
        return 1
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    return 4 if 0xF0 <= lead <= 0xF4 else 0


def _decode(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _first_character(data: bytes) -> str | None:
    """First character, or None if it is incomplete."""
    length = _character_length(data[0])
    return _decode(data[:length]) if 0 < length <= len(data) else None


def _last_character(data: bytes) -> str | None:
    """Last character, or None if it is incomplete."""
    start = len(data) - 1
    while start > 0 and data[start] & 0xC0 == 0x80 and len(data) - start < 4:
        start -= 1
    return _decode(data[start:])


def byte_level_alphabet() -> dict[str, int]:
    """Returns the character -> byte mapping of byte-level tokenizers.

    Printable Latin-1 bytes map to themselves; the others to the characters from U+0100 on, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(plain)))})
    return alphabet


def vocabulary_flags(tokens: Sequence[bytes | str | None]) -> numpy.ndarray:
    """Computes the flags of a vocabulary.

    Args:
        tokens: per id its bytes (possibly part of a character), its text, or None for special and unused ids.

    Returns:
        uint8 [vocabulary].
    """
    flags = numpy.full(len(tokens), BOTH, dtype=numpy.uint8)
    for index, token in enumerate(tokens):
        if isinstance(token, str):
            flags[index] = text_flags(token)
        elif token is not None:
            flags[index] = bytes_flags(token)
    return flags
