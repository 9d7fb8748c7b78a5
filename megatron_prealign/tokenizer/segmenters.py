"""Where words start in text without spaces between them: well-kept segmenters behind one interface."""

import importlib
import logging
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from megatron_prealign.errors import UserError

# SudachiPy's limit is 49,149 bytes a call. A character has at most 4.
_SUDACHI_CHARACTERS = 12_000


class Segmenter(Protocol):
    """Finds words. Made once per process, with the language code of the corpus."""

    def word_starts(self, text: str) -> Sequence[int]:
        """The character offsets in `text` where a word starts.

        Punctuation and white space may count as words or not: tokens tell those boundaries by themselves. The answer
        must depend on `text` alone, so that the number of worker processes changes nothing.
        """
        ...


class JiebaSegmenter:
    """jieba, for Chinese."""

    def __init__(self, language: str) -> None:
        jieba = _import("jieba", "jieba")
        jieba.setLogLevel(logging.WARNING)
        self._tokenizer = jieba.Tokenizer()
        with tempfile.TemporaryDirectory() as directory:
            # The cache it keeps in the machine's temporary directory may be another version's, or another user's.
            self._tokenizer.tmp_dir = directory
            self._tokenizer.initialize()

    def word_starts(self, text: str) -> list[int]:
        return [start for _, start, _ in self._tokenizer.tokenize(text)]


class SudachiSegmenter:
    """SudachiPy with its small dictionary, for Japanese; short units (mode A), which dictionaries list."""

    def __init__(self, language: str) -> None:
        sudachipy = _import("sudachi", "sudachipy")
        _import("sudachi", "sudachidict_small")
        dictionary = sudachipy.Dictionary(dict="small")
        self._tokenizer = dictionary.tokenizer(mode=sudachipy.SplitMode.A)

    def word_starts(self, text: str) -> list[int]:
        starts: list[int] = []
        at = 0
        for line in text.splitlines(keepends=True):
            for part in cut(line, _SUDACHI_CHARACTERS):
                starts += [at + word.begin() for word in self._tokenizer.tokenize(part)]
                at += len(part)
        return starts


class NewmmSegmenter:
    """PyThaiNLP's newmm, for Thai."""

    def __init__(self, language: str) -> None:
        self._tokenize = _import("newmm", "pythainlp.tokenize").word_tokenize

    def word_starts(self, text: str) -> list[int]:
        # "safe" bounds the time that newmm takes on long text with many possible readings.
        words = self._tokenize(text, engine="newmm-safe", keep_whitespace=True, join_broken_num=False)
        return _starts_of(words)


class IcuSegmenter:
    """ICU's word break iterator, for Chinese, Japanese, Thai, Lao, Khmer, Burmese and text of several scripts."""

    def __init__(self, language: str) -> None:
        self._breaker = _import("icu", "icu4py.breakers").WordBreaker
        self._language = language

    def word_starts(self, text: str) -> list[int]:
        # The positions that `segments()` gives count UTF-16 units.
        return _starts_of(self._breaker(text, self._language))


BUILT_IN: dict[str, Callable[[str], Segmenter]] = {
    "jieba": JiebaSegmenter,
    "sudachi": SudachiSegmenter,
    "newmm": NewmmSegmenter,
    "icu": IcuSegmenter,
}

AUTO = "auto"
BY_LANGUAGE = {"zh": "jieba", "ja": "sudachi", "th": "newmm", "lo": "icu", "km": "icu", "my": "icu"}
"""What `auto` means for a language; scripts with spaces need none."""


def resolve_segmenter(name: str | None, language: str) -> str | None:
    """The segmenter that `name` means for a language: `auto` is looked up in `BY_LANGUAGE`, None and others stay.

    A region, a script or a suffix behind the code changes nothing: zh_TW, zh-Hans and zh_clone are zh.
    """
    if name != AUTO:
        return name
    return BY_LANGUAGE.get(language.replace("-", "_").partition("_")[0].lower())


def open_segmenter(name: str, language: str) -> Segmenter:
    """The segmenter of a name: one of `BUILT_IN`, or `module:Class` for a class of one's own.

    Args:
        name: not `auto`, which `resolve_segmenter` takes care of. For `module:Class`, the module is imported as Python
            finds it; the class is called with the language code and its instance must have `word_starts`, as in
            `Segmenter`.
        language: language code of the corpus.

    Raises:
        UserError: an unknown name, a package that is not installed, a class that cannot be made or is no segmenter.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](language)
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(
            f"segmenter {name!r}: unknown; expected auto, {', '.join(BUILT_IN)}, or module:Class of your own"
        )
    try:
        made = getattr(importlib.import_module(module), attribute)(language)
    except UserError:
        raise
    except Exception as error:
        # It is the user's own code, which may raise anything.
        raise UserError(
            f"segmenter {name}: cannot be made ({_told(error)}); expected an importable module (set PYTHONPATH) with a "
            "class that takes the language code"
        ) from error
    if not callable(getattr(made, "word_starts", None)):
        raise UserError(f"segmenter {name}: has no method word_starts(text); expected one that gives character offsets")
    return made


def checked_word_starts(segmenter: Segmenter, name: str, text: str, where: str) -> np.ndarray:
    """`segmenter.word_starts(text)` sorted, each once, int64.

    Raises:
        UserError: the segmenter failed, or gave offsets that are no whole numbers or lie outside the text.
    """
    try:
        starts = np.unique(np.asarray(segmenter.word_starts(text)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{where}: segmenter {name} failed ({_told(error)}), expected character offsets from 0 to {len(text)}; "
            "correct its word_starts(text), or take this document out"
        ) from error
    if len(starts) == 0:
        return np.empty(0, dtype=np.int64)
    if starts.dtype.kind not in "iu" or starts[0] < 0 or starts[-1] > len(text):
        raise UserError(
            f"{where}: segmenter {name} gave word starts from {starts[0]} to {starts[-1]}, expected character offsets "
            f"from 0 to {len(text)}; correct its word_starts(text)"
        )
    return starts.astype(np.int64)


def cut(text: str, limit: int) -> list[str]:
    """`text` in parts of at most `limit` characters, cut behind white space or punctuation where a part has any, so
    that no word is cut in two."""
    parts = []
    begin = 0
    while len(text) - begin > limit:
        end = begin + limit
        end = next((at for at in range(end, begin, -1) if _separates(text[at - 1])), end)
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def _separates(character: str) -> bool:
    return character.isspace() or unicodedata.category(character)[0] == "P"


def _told(error: Exception) -> str:
    """An error of someone else's code in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _starts_of(words: Any) -> list[int]:
    """Offsets of words that make up the whole text."""
    return [0, *accumulate(len(word) for word in words)][:-1]


def _import(segmenter: str, module: str) -> Any:
    try:
        with warnings.catch_warnings():
            # jieba 0.42.1 is older than Python's warnings about pkg_resources and escapes in strings.
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"segmenter {segmenter}: the package {error.name or module} is not installed; install it with "
            "pip install 'megatron-prealign[segmenters]'"
        ) from error
