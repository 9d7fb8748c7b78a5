"""Builds groups from word pairs: one source word with all its translations, in one or more languages.

This module is independent of the tokenizer. Dropped pairs are counted by rule, so that a user sees what happened to the
pairs of a file. Lists have millions of pairs: each distinct word is classified once, in batches, and pairs are arrays.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress, count, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.scripts import scripts_of
from megatron_prealign.dictionary.words import (
    EMPTY as EMPTY_BIT,
)
from megatron_prealign.dictionary.words import (
    FIRST_SCRIPT_BIT,
    HAS_LETTER,
    TO_CLEAN,
    WordClassifier,
    WordInfo,
    clean,
    has_note,
)
from megatron_prealign.errors import UserError

# Rule names are printed and stored in the table, in the order in which the rules apply.
READ = "pairs read"
EMPTY = "pairs without a word on one side"
MULTI_WORD_SOURCE = "pairs with a multi-word source"
WITHOUT_LETTER = "pairs with a word without a letter"
WRONG_SCRIPT = "pairs with a word in none of its language's scripts"
SHORT = "pairs with a word of too few characters"
LONG = "pairs with a word of too many characters"
MANY_WORDS = "pairs with a translation of too many words"
DUPLICATE = "duplicate pairs"
CLEANED = "words cleaned (Unicode NFC, spaces, invisible characters)"
NOTES = "words stripped of notes in brackets and markup"
_RULES = (READ, EMPTY, MULTI_WORD_SOURCE, WITHOUT_LETTER, WRONG_SCRIPT, SHORT, LONG, MANY_WORDS, DUPLICATE)


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Rules for words and pairs that need no tokenizer."""

    notes: bool = True
    """Remove notes in brackets and markup from words."""
    scripts: bool = True
    """Drop pairs with a word that has no letter of any script of its language."""
    min_characters: int = 1
    """Minimum length of a word in characters."""
    max_characters: int = 100
    """Maximum length of a word or phrase in characters."""
    max_words: int | None = None
    """Maximum length of a translation in words."""

    def __post_init__(self) -> None:
        for name in ("min_characters", "max_characters", "max_words"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 or more")
        if self.max_characters < self.min_characters:
            raise UserError(
                f"--max-characters is {self.max_characters}, expected {self.min_characters} (--min-characters) or more"
            )


@dataclass
class ScriptFit:
    """Number of pairs of a list that match the scripts of its languages, as declared and swapped.

    Only pairs of languages without a common script count.
    """

    pairs: int = 0
    as_declared: int = 0
    swapped: int = 0


@dataclass(frozen=True)
class Groups:
    """Groups of words as texts; the groups share one list of texts.

    Attributes:
        languages: codes; the index is the language id.
        texts: distinct (language, word) pairs, sorted by language [T].
        text_language: language id of each text [T].
        source: text index of each group's source word [G], groups in order of first occurrence.
        pair_group: group of each pair [P], ascending.
        pair_target: text index of each pair's translation [P]; within a group by language, then in file order.
        pair_weight: weight of each pair [P], above 0; the largest weight of a repeated pair.
    """

    languages: tuple[str, ...]
    texts: tuple[str, ...]
    text_language: NDArray[np.int16]
    source: NDArray[np.int32]
    pair_group: NDArray[np.int32]
    pair_target: NDArray[np.int32]
    pair_weight: NDArray[np.float32]


@dataclass
class _Vocabulary:
    """Distinct raw words of one language, numbered in order of occurrence; each is classified once."""

    classifier: WordClassifier
    numbers: defaultdict[str, int] = field(default_factory=lambda: defaultdict(count().__next__))
    """Word -> number; looking up a new word assigns the next number, so one pass over a column finds and adds."""
    batches: list[WordInfo] = field(default_factory=list)
    """Properties of each word after cleaning, in batches."""
    cleaned: dict[int, int] = field(default_factory=dict)
    """Number of a word that needed cleaning -> number of the clean word."""

    def number(self, column: list[str], cleaned: dict[str, str]) -> NDArray[np.int32]:
        """Returns the number of each word; adds words that needed cleaning to `cleaned`."""
        numbers, begin = self.numbers, len(self.numbers)
        result = np.fromiter(map(numbers.__getitem__, column), np.int32, len(column))
        new = list(islice(reversed(numbers), len(numbers) - begin))[::-1]
        batch = self.classifier.classify(new)
        self.batches.append(batch)
        dirty = np.flatnonzero(batch.flags & np.uint64(TO_CLEAN)).tolist()
        for index in dirty:
            if new[index] not in cleaned:
                cleaned[new[index]] = clean(new[index], self.classifier.notes)
        dirty = [index for index in dirty if cleaned[new[index]] != new[index]]
        if dirty:
            dirty_numbers = [begin + index for index in dirty]
            clean_numbers = self.number([cleaned[new[index]] for index in dirty], cleaned)
            self.cleaned.update(zip(dirty_numbers, clean_numbers.tolist(), strict=True))
            for values in self.info():
                values[dirty_numbers] = values[clean_numbers]
        return result

    def info(self) -> WordInfo:
        """Returns the properties of each word."""
        if len(self.batches) != 1:
            self.batches = [WordInfo(*map(np.concatenate, zip(*self.batches, strict=True)))]
        return self.batches[0]

    def clean_numbers(self) -> NDArray[np.int64]:
        """Returns the number of the clean form of each word."""
        numbers = np.arange(len(self.numbers))
        numbers[list(self.cleaned)] = list(self.cleaned.values())
        return numbers


@dataclass(frozen=True)
class _Pairs:
    """Pairs of one source and one target language [P]; words are numbers of their vocabularies."""

    source_language: int
    target_language: int
    position: NDArray[np.int64]
    """Position in the order of reading."""
    source: NDArray[np.int32]
    target: NDArray[np.int32]
    weight: NDArray[np.float32]


@dataclass
class GroupBuilder:
    """Collects pairs from any number of files; pairs with the same source language and word form one group."""

    counts: Counter[str] = field(default_factory=Counter)
    cleaning: Cleaning = Cleaning()
    phrase_sources: frozenset[str] = frozenset()
    """Languages whose source words may be phrases."""
    fit: ScriptFit = field(default_factory=ScriptFit)
    """Script statistics of the pairs added since it was last set."""
    _languages: dict[str, int] = field(default_factory=dict)
    _vocabularies: list[_Vocabulary] = field(default_factory=list)
    """One per language."""
    _pairs: list[_Pairs] = field(default_factory=list)
    _cleaned: dict[str, str] = field(default_factory=dict)
    _num_read: int = 0

    def add_columns(
        self, columns: Sequence[list[str]], languages: Sequence[str], weights: Sequence[float] | None = None
    ) -> int:
        """Adds entries column by column.

        Args:
            columns: one list of words per language, all of the same length.
            languages: codes, source first.
            weights: weight of each entry, above 0; default 1.

        Returns:
            The number of pairs.
        """
        for rule in (*_RULES, CLEANED, NOTES):
            self.counts[rule] += 0
        ids = [self._languages.setdefault(code, len(self._languages)) for code in languages]
        for _ in range(len(self._languages) - len(self._vocabularies)):
            self._vocabularies.append(_Vocabulary(WordClassifier(self.cleaning.notes)))
        count, targets = len(columns[0]), len(columns) - 1
        weight = np.ones(count, dtype=np.float32) if weights is None else np.asarray(weights, dtype=np.float32)
        source, *translations = (
            self._vocabularies[language].number(column, self._cleaned)
            for language, column in zip(ids, columns, strict=True)
        )
        for number, (language, target) in enumerate(zip(ids[1:], translations, strict=True)):
            kept = self._usable(ids[0], source, language, target)
            position = self._num_read + kept * targets + number
            self._pairs.append(_Pairs(ids[0], language, position, source[kept], target[kept], weight[kept]))
        self._num_read += count * targets
        self.counts[READ] += count * targets
        return count * targets

    def _usable(
        self, source_language: int, source: NDArray[np.int32], target_language: int, target: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """Returns the rows that no rule drops."""
        names = list(self._languages)
        scripts = [scripts_of(names[language]) for language in (source_language, target_language)]
        left = self._vocabularies[source_language].info().take(source)
        right = self._vocabularies[target_language].info().take(target)
        flags = left.flags | right.flags
        empty = flags & np.uint64(EMPTY_BIT) != 0
        without_letter = left.flags & right.flags & np.uint64(HAS_LETTER) == 0
        self._count_scripts(left.flags[~(empty | without_letter)], right.flags[~(empty | without_letter)], scripts)
        phrases = names[source_language] in self.phrase_sources
        rules, keep = self.cleaning, np.ones(len(source), dtype=bool)
        shortest = np.minimum(left.characters, right.characters)
        longest = np.maximum(left.characters, right.characters)
        for rule, bad in (
            (EMPTY, empty),
            (MULTI_WORD_SOURCE, (left.spaces > 0) & (not phrases)),
            (WITHOUT_LETTER, without_letter),
            (
                WRONG_SCRIPT,
                ~(_written_in(left.flags, scripts[0]) & _written_in(right.flags, scripts[1])) & rules.scripts,
            ),
            (SHORT, shortest < rules.min_characters),
            (LONG, longest > rules.max_characters),
            (MANY_WORDS, right.spaces >= (rules.max_words or np.iinfo(np.int32).max)),
        ):
            self.counts[rule] += int((keep & bad).sum())
            keep &= ~bad
        return np.flatnonzero(keep)

    def _count_scripts(self, left: NDArray[np.uint64], right: NDArray[np.uint64], scripts: Sequence[int]) -> None:
        """Updates `fit` with pairs, given as the flags of their words."""
        if not scripts[0] or not scripts[1] or scripts[0] & scripts[1]:
            return
        self.fit.pairs += len(left)
        self.fit.as_declared += int(_fits(left, right, scripts).sum())
        self.fit.swapped += int(_fits(left, right, scripts[::-1]).sum())

    def build(self) -> Groups:
        """Builds the groups of all pairs added so far."""
        changed = [word for word, cleaned in self._cleaned.items() if cleaned != word.strip()]
        self.counts[NOTES] = sum(map(has_note, changed)) if self.cleaning.notes else 0
        self.counts[CLEANED] = len(changed) - self.counts[NOTES]
        clean_numbers = [vocabulary.clean_numbers() for vocabulary in self._vocabularies]
        first = np.cumsum([0, *map(len, clean_numbers)])
        sources, targets = (
            [clean_numbers[language][numbers] + first[language] for language, numbers in side]
            for side in (
                [(pairs.source_language, pairs.source) for pairs in self._pairs],
                [(pairs.target_language, pairs.target) for pairs in self._pairs],
            )
        )
        source, target = _concatenate(sources, np.int64), _concatenate(targets, np.int64)
        weight = _concatenate([pairs.weight for pairs in self._pairs], np.float32)
        order = np.argsort(_concatenate([pairs.position for pairs in self._pairs], np.int64), kind="stable")
        language = np.repeat(np.arange(len(self._languages), dtype=np.int16), np.diff(first))
        groups, repeated = group_pairs(
            tuple(self._languages),
            list(chain.from_iterable(each.numbers for each in self._vocabularies)),
            language,
            source[order],
            target[order],
            weight[order],
        )
        self.counts[DUPLICATE] = repeated
        return groups


def group_pairs(
    languages: tuple[str, ...],
    texts: Sequence[str],
    text_language: NDArray[np.int16],
    source: NDArray[np.int64],
    target: NDArray[np.int64],
    weight: NDArray[np.float32],
) -> tuple[Groups, int]:
    """Groups pairs; returns the groups and the number of duplicate pairs.

    Args:
        languages: codes.
        texts: distinct (language, word) pairs, sorted by language; unused ones are dropped [T].
        text_language: language id of each text [T].
        source: text index of the source word of each pair, in the order of reading [P].
        target: text index of the translation of each pair [P].
        weight: weight of each pair [P].
    """
    used, source, target = _renumbered(len(texts), source, target)
    texts, text_language = tuple(compress(texts, used.tolist())), text_language[used]
    # Groups are numbered by the first occurrence of their source words.
    words, first, source_rank = np.unique(source, return_index=True, return_inverse=True)
    by_occurrence = np.argsort(first)
    number = np.empty(len(words), dtype=np.int64)
    number[by_occurrence] = np.arange(len(words))
    group = number[source_rank]
    # np.unique returns the first occurrence of equal pairs.
    _, once, same = np.unique(group * (len(texts) + 1) + target, return_index=True, return_inverse=True)
    largest = np.zeros(len(once), dtype=np.float32)
    np.maximum.at(largest, same, weight)
    # By group and language; translations of one language keep the order of the files, because dictionaries list the
    # best first.
    order = np.lexsort((once, text_language[target[once]], group[once]))
    groups = Groups(
        languages=languages,
        texts=texts,
        text_language=text_language,
        source=words[by_occurrence].astype(np.int32),
        pair_group=group[once][order].astype(np.int32),
        pair_target=target[once][order].astype(np.int32),
        pair_weight=largest[order],
    )
    return groups, len(group) - len(once)


def without_unused_texts(groups: Groups) -> tuple[Groups, NDArray[np.bool_]]:
    """Drops unused texts; returns the groups and the mask of the texts kept `[T]`."""
    used, source, target = _renumbered(len(groups.texts), groups.source, groups.pair_target)
    kept = replace(
        groups,
        texts=tuple(compress(groups.texts, used.tolist())),
        text_language=groups.text_language[used],
        source=source.astype(np.int32),
        pair_target=target.astype(np.int32),
    )
    return kept, used


def _renumbered(
    count: int, source: NDArray[Any], target: NDArray[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64]]:
    """Returns the mask of the texts used by `source` and `target`, bool `[count]`, and both renumbered to these."""
    used = np.zeros(count, dtype=bool)
    used[source] = used[target] = True
    number = np.cumsum(used) - 1
    return used, number[source], number[target]


def _written_in(flags: NDArray[np.uint64], scripts: int) -> NDArray[np.bool_]:
    """Whether each word has a letter of one of the `scripts`; True for all words without scripts."""
    if not scripts:
        return np.ones(len(flags), dtype=bool)
    return flags & np.uint64(scripts << FIRST_SCRIPT_BIT) != 0


def _fits(left: NDArray[np.uint64], right: NDArray[np.uint64], scripts: Sequence[int]) -> NDArray[np.bool_]:
    """Whether both words of each pair match the scripts of their languages."""
    return _written_in(left, scripts[0]) & _written_in(right, scripts[1])


def _concatenate(parts: list[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype=dtype), *parts])
