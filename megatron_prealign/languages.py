"""The rule of language codes: any code that is safe in file names and the same everywhere (en, zh_hant, en_clone)."""

import re

from megatron_prealign.errors import UserError

EXPECTED = "a language code of letters, digits, '_', '.' and '-' such as de, at most 63 characters"
_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def is_language_code(text: object) -> bool:
    """Whether `text` is a string that may be a language code."""
    return isinstance(text, str) and _CODE.fullmatch(text) is not None


def check_language_code(text: str, where: str) -> str:
    """Returns `text` if it may be a language code.

    Args:
        where: The option or file that it comes from.

    Raises:
        UserError: it may not.
    """
    if not is_language_code(text):
        raise UserError(f"{where} is {text[:80]!r}, expected {EXPECTED}")
    return text
