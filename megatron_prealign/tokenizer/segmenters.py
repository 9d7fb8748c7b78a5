"""Segmenters, which find words in text without spaces, behind one interface."""

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

# SudachiPy's limit is 49,149 bytes per call. A character has at most 4.
_SUDACHI_CHARACTERS = 12_000


class Segmenter(Protocol):
    """Finds words. Created once per process, with the language code of the corpus."""

    def word_starts(self, text: str) -> Sequence[int]:
        """Returns the character offsets in `text` at which words start.

        Punctuation and white space may count as words or not: tokens already show those boundaries. The result must
        depend only on `text`, so that it is independent of the number of worker processes.
        """
        ...


class JiebaSegmenter:
    """jieba, for Chinese."""

    def __init__(self, language: str) -> None:
        jieba = _import("jieba", "jieba")
        jieba.setLogLevel(logging.WARNING)
        self._tokenizer = jieba.Tokenizer()
        with tempfile.TemporaryDirectory() as directory:
            # Its cache in the system's temporary directory may belong to another version or user.
            self._tokenizer.tmp_dir = directory
            self._tokenizer.initialize()

    def word_starts(self, text: str) -> list[int]:
        return [start for _, start, _ in self._tokenizer.tokenize(text)]


class SudachiSegmenter:
    """SudachiPy with its small dictionary, for Japanese; short units (mode A), as listed in dictionaries."""

    def __init__(self, language: str) -> None:
        sudachipy = _import("sudachi", "sudachipy")
        _import("sudachi", "sudachidict_small")
        dictionary = sudachipy.Dictionary(dict="small")
        self._tokenizer = dictionary.tokenizer(mode=sudachipy.SplitMode.A)

    def word_starts(self, text: str) -> list[int]:
        starts: list[int] = []
        at = 0
        for line in text.splitlines(keepends=True):
            for part in split_text(line, _SUDACHI_CHARACTERS):
                starts += [at + word.begin() for word in self._tokenizer.tokenize(part)]
                at += len(part)
        return starts


class NewmmSegmenter:
    """PyThaiNLP's newmm, for Thai."""

    def __init__(self, language: str) -> None:
        self._tokenize = _import("newmm", "pythainlp.tokenize").word_tokenize

    def word_starts(self, text: str) -> list[int]:
        # newmm-safe bounds the time on long text with many possible segmentations.
        words = self._tokenize(text, engine="newmm-safe", keep_whitespace=True, join_broken_num=False)
        return _starts_of(words)


class IcuSegmenter:
    """ICU's word break iterator, for Chinese, Japanese, Thai, Lao, Khmer, Burmese and text of several scripts."""

    def __init__(self, language: str) -> None:
        self._breaker = _import("icu", "icu4py.breakers").WordBreaker
        self._language = language

    def word_starts(self, text: str) -> list[int]:
        # The positions returned by `segments()` count UTF-16 units.
        return _starts_of(self._breaker(text, self._language))


BUILT_IN: dict[str, Callable[[str], Segmenter]] = {
    "jieba": JiebaSegmenter,
    "sudachi": SudachiSegmenter,
    "newmm": NewmmSegmenter,
    "icu": IcuSegmenter,
}

AUTO = "auto"
BY_LANGUAGE = {"zh": "jieba", "ja": "sudachi", "th": "newmm", "lo": "icu", "km": "icu", "my": "icu"}
"""Segmenter that `auto` selects for a language; scripts with spaces need none."""


def resolve_segmenter(name: str | None, language: str) -> str | None:
    """Resolves `auto` for a language with `BY_LANGUAGE`; returns other names and None unchanged.

    A region, script or suffix after the code is ignored: zh_TW, zh-Hans and zh_clone are zh.
    """
    if name != AUTO:
        return name
    return BY_LANGUAGE.get(language.replace("-", "_").partition("_")[0].lower())


def parse_segmenters(texts: Sequence[str], languages: Sequence[str]) -> dict[str, str]:
    """Parses `LANGUAGE=NAME` and `auto` to language -> segmenter; a named segmenter takes precedence over `auto`.

    Raises:
        UserError: the text does not have this form, no input has the language, or it is given twice.
    """
    named: dict[str, str] = {}
    for text in texts:
        language, equals, name = text.partition("=")
        if text == AUTO:
            continue
        if not equals or not language or not name:
            raise UserError(f"--segmenter {text}: expected LANGUAGE=NAME such as ja=sudachi, or auto")
        if language not in languages:
            raise UserError(
                f"--segmenter {text}: no input has language {language}, expected one of {', '.join(languages)}; "
                "correct it, or the language given after the colon of an input"
            )
        if language in named:
            raise UserError(
                f"--segmenter {text}: {language} already has segmenter {named[language]}; use one per language"
            )
        named[language] = name
    segmenters = {}
    for language in languages:
        resolved = resolve_segmenter(named.get(language, AUTO if AUTO in texts else None), language)
        if resolved is not None:
            segmenters[language] = resolved
    return segmenters


def open_segmenter(name: str, language: str) -> Segmenter:
    """Creates a segmenter: one of `BUILT_IN`, or `module:Class` for a custom class.

    Args:
        name: name of the segmenter, not `auto` (see `resolve_segmenter`). For `module:Class`, the module is imported
            from Python's path; the class is called with the language code and must implement `Segmenter`.
        language: language code of the corpus.

    Raises:
        UserError: the name is unknown, a package is not installed, or the class cannot be instantiated or is not a
            segmenter.
    """
    if name in BUILT_IN:
        return BUILT_IN[name](language)
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise UserError(
            f"unknown segmenter {name!r}, expected auto, {', '.join(BUILT_IN)}, or module:Class for a custom one"
        )
    try:
        segmenter = getattr(importlib.import_module(module), attribute)(language)
    except UserError:
        raise
    except Exception as error:
        # User code may raise anything.
        raise UserError(
            f"cannot create segmenter {name}: {_one_line(error)}; use a class that takes the language code, in an "
            "importable module (set PYTHONPATH)"
        ) from error
    if not callable(getattr(segmenter, "word_starts", None)):
        raise UserError(f"segmenter {name}: method word_starts(text) is missing; it must return character offsets")
    return segmenter


def checked_word_starts(segmenter: Segmenter, name: str, text: str, where: str) -> np.ndarray:
    """Returns the sorted, unique `segmenter.word_starts(text)` as int64.

    Raises:
        UserError: the segmenter failed, or returned offsets that are not integers or are outside the text.
    """
    try:
        starts = np.unique(np.asarray(segmenter.word_starts(text)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{where}: segmenter {name} failed ({_one_line(error)}), expected character offsets from 0 to {len(text)}; "
            "fix its word_starts(text), or remove this document"
        ) from error
    if len(starts) == 0:
        return np.empty(0, dtype=np.int64)
    if starts.dtype.kind not in "iu" or starts[0] < 0 or starts[-1] > len(text):
        raise UserError(
            f"{where}: segmenter {name} returned word starts from {starts[0]} to {starts[-1]}, expected character "
            f"offsets from 0 to {len(text)}; fix its word_starts(text)"
        )
    return starts.astype(np.int64)


def split_text(text: str, limit: int) -> list[str]:
    """Splits `text` into parts of at most `limit` characters, after white space or punctuation if possible, so that
    words stay intact."""
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


def _one_line(error: Exception) -> str:
    """Returns an error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _starts_of(words: Any) -> list[int]:
    """Start offsets of words that together form the text."""
    return [0, *accumulate(len(word) for word in words)][:-1]


def _import(segmenter: str, module: str) -> Any:
    try:
        with warnings.catch_warnings():
            # jieba 0.42.1 triggers newer Python warnings about pkg_resources and string escapes.
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"segmenter {segmenter}: {error.name or module} is not installed; install it with "
            "pip install 'megatron-prealign[segmenters]'"
        ) from error
