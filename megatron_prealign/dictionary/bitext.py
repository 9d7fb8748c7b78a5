"""Reads parallel text, one sentence pair per line, as numbers of words.

Words are runs of letters as elsewhere in `dictionary`: `don't` is `don` and `t`, digits are no words.
"""

import unicodedata
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.formats.base import Reading, read_lines
from megatron_prealign.dictionary.ragged import offsets_of
from megatron_prealign.dictionary.readers import DictionaryInput, FileInfo, OnError, ReadErrors
from megatron_prealign.dictionary.running_words import letter_runs_as_written
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress
from megatron_prealign.text import plural
from megatron_prealign.tokenizer.segmenters import (
    AUTO,
    Segmenter,
    checked_word_starts,
    open_segmenter,
    parse_segmenters,
    resolve_segmenter,
)

_PROGRESS_LINES = 1 << 12


class Side(NamedTuple):
    """One language of S sentence pairs, with F forms (spellings) and N running words."""

    forms: list[str]
    """Distinct forms, in the order of their first occurrence `[F]`."""
    running: NDArray[np.int32]
    """Form of every running word `[N]`."""
    offsets: NDArray[np.int64]
    """First running word of every sentence, and N `[S + 1]`."""


@dataclass(frozen=True)
class Bitext:
    """Sentence pairs.

    Attributes:
        languages: source and target.
        sides: their text.
        empty: number of sentence pairs left out because a side has no word.
        too_long: number of sentence pairs left out because a side has too many words.
    """

    languages: tuple[str, str]
    sides: tuple[Side, Side]
    empty: int
    too_long: int

    @property
    def pairs(self) -> int:
        """Number of sentence pairs that were kept."""
        return len(self.sides[0].offsets) - 1


class _Numbers(dict[str, int]):
    """Numbers words in the order of their first occurrence."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


class _Words:
    """Splits the text of one language into words and collects their numbers."""

    def __init__(self, segmenter: Segmenter | None, segmenter_name: str) -> None:
        self._segmenter, self._segmenter_name = segmenter, segmenter_name
        self._numbers = _Numbers()
        self._running, self._lengths = array("i"), array("i")

    def split(self, text: str, where: str) -> list[str]:
        # Lists are normalised in the same way by `dictionary build`.
        text = unicodedata.normalize("NFC", text)
        if self._segmenter is not None:
            starts = checked_word_starts(self._segmenter, self._segmenter_name, text, where).tolist()
            text = " ".join(text[begin:end] for begin, end in zip([0, *starts], [*starts, len(text)], strict=True))
        return letter_runs_as_written(text)

    def add(self, words: Sequence[str]) -> None:
        self._running.extend(map(self._numbers.__getitem__, words))
        self._lengths.append(len(words))

    def side(self) -> Side:
        # Arrays of Python's array module are 32-bit wherever numpy runs.
        running = np.frombuffer(self._running, np.int32) if self._running else np.zeros(0, np.int32)
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.zeros(0, np.int32)
        return Side(list(self._numbers), running, offsets_of(lengths))


def bitext_languages(inputs: Sequence[DictionaryInput]) -> tuple[str, str]:
    """Returns source and target language: those of the first file, whose columns others may have in reverse.

    Raises:
        UserError: a file has other languages.
    """
    source, target = inputs[0].languages
    for each in inputs:
        if set(each.languages) != {source, target}:
            raise UserError(
                f"--bitext {each.path}: got languages {'-'.join(each.languages)}, expected {source}-{target} as in "
                f"{inputs[0].path}; make one list for each pair of languages"
            )
    return source, target


def choose_segmenters(texts: Sequence[str], languages: Sequence[str]) -> dict[str, str]:
    """Returns language -> segmenter of the `--segmenter` options.

    Raises:
        UserError: see `parse_segmenters`; a language without spaces between words has none.
    """
    names = parse_segmenters(texts, languages)
    for language in languages:
        needed = resolve_segmenter(AUTO, language)
        if needed is not None and language not in names:
            raise UserError(
                f"--bitext: {language} is written without spaces between words, expected a segmenter for it; add "
                f"--segmenter {language}={needed}, or another segmenter"
            )
    return names


def read_bitext(
    inputs: Sequence[DictionaryInput],
    segmenters: Mapping[str, str],
    errors: ReadErrors,
    *,
    max_words: int,
    on_error: OnError = "stop",
    show_progress: bool = False,
) -> Bitext:
    """Reads sentence pairs, line by line; what is kept is 4 bytes per running word and the distinct forms.

    Args:
        inputs: one or more files of two tab-separated columns, of the same two languages.
        segmenters: language -> segmenter; other languages are split at non-letters.
        errors: collects every skipped line (only with `on_error="skip"`).
        max_words: a pair with a longer sentence is left out.
        on_error: `stop` raises at the first line without two columns, `skip` counts it and continues.

    Raises:
        UserError: a file cannot be read or is empty; a segmenter cannot be used; no sentence pair is left; with `stop`
            also a bad line.
    """
    languages = bitext_languages(inputs)
    sides = [
        _Words(open_segmenter(segmenters[each], each) if each in segmenters else None, segmenters.get(each, ""))
        for each in languages
    ]
    empty = too_long = kept = 0
    with Progress("read", unit="lines", enabled=show_progress) as progress:
        for source in inputs:
            reversed_columns = source.languages != languages
            reading = Reading(source, errors, on_error, FileInfo(format="tsv"))
            for number, line in read_lines(reading):
                if not number % _PROGRESS_LINES:
                    progress.update(_PROGRESS_LINES)
                columns = line.split("\t")
                if len(columns) != 2:
                    if line.strip():
                        reading.bad_entry(
                            number, f"got {plural(len(columns), 'column')}, expected 2 separated by a tab"
                        )
                    continue
                if reversed_columns:
                    columns.reverse()
                where = f"{source.path}:{number}"
                words = [side.split(text, where) for side, text in zip(sides, columns, strict=True)]
                if not all(words):
                    empty += 1
                elif max(map(len, words)) > max_words:
                    too_long += 1
                else:
                    kept += 1
                    for side, each in zip(sides, words, strict=True):
                        side.add(each)
    if not kept:
        raise UserError(
            f"--bitext {inputs[0].path}: no sentence pair is left: {empty:,} with a side without words, {too_long:,} "
            f"with a sentence of more than {max_words} words (--max-words); check that each line is SOURCE<TAB>TARGET"
        )
    return Bitext(languages, (sides[0].side(), sides[1].side()), empty, too_long)
