"""Case variants of words: capitalised (start of a sentence) and upper case."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import filterfalse
from operator import ne
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

Case = Literal["as_is", "capitalised", "upper"]


# Earlier cases win when two give the same tokens: spellings of the dictionary take precedence over derived ones.
# The index of a case is its value in the table's `key_form`.
CASES: tuple[Case, ...] = ("as_is", "capitalised", "upper")

# Languages that distinguish dotted and dotless i: their capital of "i" is "İ".
_DOTTED_I = frozenset({"tr", "az", "kk_latn", "crh", "tt_latn"})


# Python maps modern Georgian to Mtavruli capitals, which running text does not use: treat the script as caseless.
_GEORGIAN = re.compile("[\u10d0-\u10ff]")


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] == "L"


def upper(word: str, language: str) -> str:
    """Returns `word` in upper case by the rules of `language`; scripts without case are unchanged."""
    if language in _DOTTED_I:
        word = word.replace("i", "İ")
    if _GEORGIAN.search(word):
        return "".join(character if _GEORGIAN.match(character) else character.upper() for character in word)
    return word.upper()


def capitalise(word: str, language: str) -> str:
    """Capitalises the first letter of `word` (`(sich) freuen` → `(Sich) freuen`); the rest is unchanged."""
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


def apply_case(words: Sequence[str], language: str, case: Case) -> list[str]:
    """Returns `words` in the given case; `as_is` keeps the spelling unchanged (the capital of a German noun)."""
    if case == "as_is":
        return list(words)
    if case == "upper":
        # Only non-ASCII words can contain a letter that needs special treatment.
        georgian = _GEORGIAN.search("".join(filterfalse(str.isascii, words)))
        if georgian or language in _DOTTED_I:
            return [upper(word, language) for word in words]
        return list(map(str.upper, words))
    # Most words start with a letter, and there are few different ones. A Dutch i may be half of an ij.
    heads = {word[:1] for word in words}
    capitals = {
        head: capitalise(head, language)
        for head in heads
        if head and _is_letter(head) and not (language == "nl" and head == "i")
    }
    return [head + word[1:] if (head := capitals.get(word[:1])) else capitalise(word, language) for word in words]


@dataclass(frozen=True)
class Spellings:
    """Words of one language in every case."""

    words: dict[Case, list[str]]
    """Every word in each case [N]."""
    changed: dict[Case, NDArray[np.bool_]]
    """Whether the case differs from the original spelling [N]."""
    is_variant: dict[Case, NDArray[np.bool_]]
    """Whether the source word is matched in that case [N]; False if the case adds no new spelling.

    Only lower-case words are capitalised (`iPhone`, `McDonald` are not), and a script without case has one spelling.
    """


def spell(words: Sequence[str], language: str) -> Spellings:
    """Returns `words` in every case by the rules of `language`."""
    spelled = {case: apply_case(words, language, case) for case in CASES}
    none = np.zeros(len(words), dtype=bool)
    changed = {case: none if case == "as_is" else _differs(spelled[case], words) for case in CASES}
    lower = np.fromiter(map(str.islower, words), bool, len(words))
    # "A" is "a" both in upper case and capitalised: it counts as capitalised, which is by far the more frequent.
    same_when_capitalised = lower & ~_differs(spelled["upper"], spelled["capitalised"])
    is_variant = {
        "as_is": np.ones(len(words), dtype=bool),
        "capitalised": changed["capitalised"] & lower,
        "upper": changed["upper"] & ~same_when_capitalised,
    }
    return Spellings(spelled, changed, cast(dict[Case, NDArray[np.bool_]], is_variant))


def _differs(left: Sequence[str], right: Sequence[str]) -> NDArray[np.bool_]:
    return np.fromiter(map(ne, left, right), bool, len(left))
