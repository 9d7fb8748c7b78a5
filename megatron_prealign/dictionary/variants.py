"""Case variants of words: how a word is written at the start of a sentence and in capitals."""

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


def apply_case(words: Sequence[str], language: str, case: Case) -> list[str]:
    """`words` in the given case; `as_is` keeps a word's own case (a German noun its capital)."""
    if case == "as_is":
        return list(words)
    if case == "upper":
        # Only words outside ASCII can hold a letter that needs a look.
        georgian = _GEORGIAN.search("".join(filterfalse(str.isascii, words)))
        if georgian or language in _DOTTED_I:
            return [upper(word, language) for word in words]
        return list(map(str.upper, words))
    # Most words begin with their first letter, and there are few different ones. A Dutch i may be half of an ij.
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
    """Where that is not the word itself [N]."""
    is_variant: dict[Case, NDArray[np.bool_]]
    """Where a source word is looked for in that case [N]; elsewhere the case adds no spelling of its own.

    Only lower-case words are capitalised (`iPhone`, `McDonald` are not), and a script without case has one spelling.
    """


def spell(words: Sequence[str], language: str) -> Spellings:
    """`words` in every case by the rules of `language`."""
    spelled = {case: apply_case(words, language, case) for case in CASES}
    nothing = np.zeros(len(words), dtype=bool)
    changed = {case: nothing if case == "as_is" else _differs(spelled[case], words) for case in CASES}
    lower = np.fromiter(map(str.islower, words), bool, len(words))
    # "a" in capitals is "A", which is also how it starts a sentence: the sentence start is by far the more frequent.
    starts_in_capitals = lower & ~_differs(spelled["upper"], spelled["capitalised"])
    is_variant = {
        "as_is": np.ones(len(words), dtype=bool),
        "capitalised": changed["capitalised"] & lower,
        "upper": changed["upper"] & ~starts_in_capitals,
    }
    return Spellings(spelled, changed, cast(dict[Case, NDArray[np.bool_]], is_variant))


def _differs(left: Sequence[str], right: Sequence[str]) -> NDArray[np.bool_]:
    return np.fromiter(map(ne, left, right), bool, len(left))
