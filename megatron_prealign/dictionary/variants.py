"""Case variants of words: how a word is written at the start of a sentence and in capitals."""

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

Case = Literal["as_is", "capitalised", "upper"]


# Earlier ones win where two of them give the same tokens: what the dictionary spells out beats what we derive from it.
# A case's place here is its number in the table's `key_form`.
CASES: tuple[Case, ...] = ("as_is", "capitalised", "upper")

# Languages that tell a dotted from a dotless i: their capital of "i" is "İ".
_DOTTED_I = frozenset({"tr", "az", "kk_latn", "crh", "tt_latn"})


# Python maps modern Georgian to Mtavruli capitals, which running text does not use: the script counts as caseless.
_GEORGIAN = re.compile("[\u10d0-\u10ff]")


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] == "L"


def upper(word: str, language: str) -> str:
    """`word` in capitals by the rules of `language`; scripts without case come back unchanged."""
    if language in _DOTTED_I:
        word = word.replace("i", "İ")
    if _GEORGIAN.search(word):
        return "".join(character if _GEORGIAN.match(character) else character.upper() for character in word)
    return word.upper()


def capitalise(word: str, language: str) -> str:
    """`word` with its first letter as a capital (`(sich) freuen` → `(Sich) freuen`), everything else untouched."""
    for index, character in enumerate(word):
        if not _is_letter(character):
            continue
        if language in _DOTTED_I and character == "i":
            capital = "İ"
        elif language == "nl" and word[index : index + 2] == "ij":
            # Dutch writes ij as one letter: IJs, IJsland.
            return word[:index] + "IJ" + word[index + 2 :]
        else:
            capital = character if _GEORGIAN.match(character) else character.title()
        return word[:index] + capital + word[index + 1 :]
    return word


_TRANSFORMS: dict[Case, Callable[[str, str], str]] = {
    "as_is": lambda word, language: word,
    "capitalised": capitalise,
    "upper": upper,
}


def apply_case(word: str, language: str, case: Case) -> str:
    """`word` in the given case; `as_is` keeps the word's own case (a German noun its capital)."""
    return _TRANSFORMS[case](word, language)


def source_variant(word: str, language: str, case: Case) -> str | None:
    """The source word in `case`, or None where that adds no spelling of its own.

    Only lower-case words are capitalised (`iPhone`, `McDonald` are not), and a script without case has one spelling.
    """
    if case == "as_is":
        return word
    if case == "capitalised" and not word.islower():
        return None
    changed = apply_case(word, language, case)
    if changed == word:
        return None
    # "a" in capitals is "A", which is also how it starts a sentence: the sentence start is by far the more frequent.
    if case == "upper" and word.islower() and changed == capitalise(word, language):
        return None
    return changed
