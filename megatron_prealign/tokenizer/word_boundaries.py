"""Which tokens of a vocabulary start or end a word: one byte of flags for each id.

Bit 0 (`STARTS_WORD`): a word boundary lies before the token. Bit 1 (`ENDS_WORD`): one lies after it. So position i of a
row starts a word exactly if bit 0 of token i or bit 1 of token i - 1 is set.
"""

import unicodedata
from collections.abc import Sequence

import numpy

STARTS_WORD = 1
ENDS_WORD = 2
BOTH = STARTS_WORD | ENDS_WORD


def is_letter(character: str) -> bool:
    """Letters and the marks that combine with them (Unicode categories L* and M*)."""
    return unicodedata.category(character)[0] in "LM"


def text_flags(text: str) -> int:
    """The flags of a token whose whole text is known; the space marker counts as the space it stands for.

    A token without text (an unused id) separates words like a special token does.
    """
    if not text:
        return BOTH
    return STARTS_WORD * (not is_letter(text[0])) | ENDS_WORD * (not is_letter(text[-1]))


def bytes_flags(data: bytes) -> int:
    """The flags of a token known by its UTF-8 bytes, which may start or end inside a character.

    Bytes of an incomplete character count as a letter: most of them are, and cutting a word in two would lose it.
    """
    if not data:
        return BOTH
    first, last = _first_character(data), _last_character(data)
    starts = first is not None and not is_letter(first)
    ends = last is not None and not is_letter(last)
    return STARTS_WORD * starts | ENDS_WORD * ends


def _character_length(lead: int) -> int:
    """Bytes of the UTF-8 character that starts with `lead`; 0 if no character starts so."""
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
    """The first character, or None if its bytes are not all there."""
    length = _character_length(data[0])
    return _decode(data[:length]) if 0 < length <= len(data) else None


def _last_character(data: bytes) -> str | None:
    """The last character, or None if its bytes are not all there."""
    start = len(data) - 1
    while start > 0 and data[start] & 0xC0 == 0x80 and len(data) - start < 4:
        start -= 1
    return _decode(data[start:])


def byte_level_alphabet() -> dict[str, int]:
    """The character that byte-level tokenizers write for each of the 256 bytes.

    Printable Latin-1 bytes stand for themselves; the others take the characters from U+0100 on, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in plain}
    alphabet.update({chr(0x100 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(plain)))})
    return alphabet


def vocabulary_flags(tokens: Sequence[bytes | str | None]) -> numpy.ndarray:
    """Flags of a whole vocabulary.

    Args:
        tokens: per id its bytes (may be part of a character), its text, or None for special and unused ids.

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
