"""Makes a word list from parallel text: the pairs that IBM model 1 supports in both directions, as they are written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_prealign.dictionary.bitext import Bitext, Side
from megatron_prealign.dictionary.formats.header import WEIGHT
from megatron_prealign.dictionary.model1 import BLOCK_LINKS, Model1, Translations, make_sentences
from megatron_prealign.errors import UserError

# The word for all words that are too rare for a pair.
_RARE = 0
_LEAST_FORM_COUNT = 2


@dataclass(frozen=True, kw_only=True)
class InduceSettings:
    """What is kept.

    Attributes:
        min_count: minimum of the smaller expected number of alignments of both directions.
        min_probability: minimum of the product of the translation probabilities of both directions.
        iterations: number of iterations of expectation-maximisation.
    """

    min_count: int = 3
    min_probability: float = 0.05
    iterations: int = 8

    def __post_init__(self) -> None:
        for name, value in (("min-count", self.min_count), ("iterations", self.iterations)):
            if value < 1:
                raise UserError(f"--{name} is {value}, expected an integer of 1 or more")
        if not 0 < self.min_probability <= 1:
            raise UserError(f"--min-probability is {self.min_probability}, expected a number above 0 and at most 1")


class Pair(NamedTuple):
    """One line of the list."""

    source: str
    target: str
    weight: float
    """Product of both translation probabilities."""


@dataclass(frozen=True)
class Vocabulary:
    """Words of one language, in any case, and their forms (spellings).

    Attributes:
        forms: forms, as in `Side`.
        form_count: occurrences of each form `[F]`.
        word_of: word of each form `[F]`.
        count: occurrences of each word `[W]`.
    """

    forms: list[str]
    form_count: NDArray[np.int64]
    word_of: NDArray[np.int32]
    count: NDArray[np.int64]

    def forms_of(self, words: NDArray[np.int32]) -> dict[int, list[int]]:
        """Returns the forms of each of the `words`, most frequent first."""
        wanted = np.zeros(len(self.count), dtype=bool)
        wanted[words] = True
        forms = np.flatnonzero(wanted[self.word_of])
        found: dict[int, list[int]] = {}
        # A stable sort: the earlier of two equally frequent forms is first.
        for form in forms[np.argsort(-self.form_count[forms], kind="stable")].tolist():
            found.setdefault(int(self.word_of[form]), []).append(form)
        return found


@dataclass(frozen=True)
class Induced:
    """The list and what it was made from.

    Attributes:
        pairs: lines of the list, in descending expected count.
        words: source and target vocabulary.
        num_translations: number of pairs of words, each of which has one or more lines.
        covered: fraction of the running words of source and target that are words of the list.
    """

    pairs: list[Pair]
    words: tuple[Vocabulary, Vocabulary]
    num_translations: int
    covered: tuple[float, float]


def induce(
    bitext: Bitext,
    settings: InduceSettings,
    scratch: Path,
    *,
    block_links: int = BLOCK_LINKS,
    show_progress: bool = False,
) -> Induced:
    """Makes a word list. The result depends only on the sentence pairs, their order, and the settings.

    Words with fewer occurrences than `min_count` cannot be in a pair and are treated as one word.

    Args:
        scratch: directory for temporary data, 4 bytes for each pair of distinct words of a sentence pair.
        block_links: see `Model1`.

    Raises:
        UserError: no pair reaches the thresholds.
    """
    source, target = (make_vocabulary(side) for side in bitext.sides)
    frequent = [_frequent_words(each, settings.min_count) for each in (source, target)]
    sentences = [
        make_sentences(_renumber(words, vocabulary)[side.running], side.offsets, len(words) + 1)
        for side, vocabulary, words in zip(bitext.sides, (source, target), frequent, strict=True)
    ]
    with Model1(sentences[0], sentences[1], scratch, block_links) as model:
        found = model.translations(settings.iterations, settings.min_count, settings.min_probability, show_progress)
    known = (found.source != _RARE) & (found.target != _RARE)
    found = Translations(*(values[known] for values in found))
    found = found._replace(source=frequent[0][found.source - 1], target=frequent[1][found.target - 1])
    if not len(found.source):
        raise UserError(
            f"no pair of words reaches --min-count {settings.min_count} and --min-probability "
            f"{settings.min_probability:g} in {bitext.pairs:,} sentence pairs; lower them, or add parallel text"
        )
    return Induced(
        list(_lines(found, source, target)),
        (source, target),
        len(found.source),
        (_covered(source, found.source), _covered(target, found.target)),
    )


def write_list(path: Path, languages: tuple[str, str], pairs: list[Pair]) -> None:
    """Writes a list for `dictionary build --weights`, with a header."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join([*languages, WEIGHT]) + "\n")
        file.writelines(f"{pair.source}\t{pair.target}\t{pair.weight:.3g}\n" for pair in pairs)


def make_vocabulary(side: Side) -> Vocabulary:
    """Finds the words of a language; forms that differ only in case are one."""
    numbers: dict[str, int] = {}
    word_of = np.array([numbers.setdefault(form.casefold(), len(numbers)) for form in side.forms], dtype=np.int32)
    form_count = np.bincount(side.running, minlength=len(side.forms))
    # Sums of integers in float64 are exact.
    count = np.bincount(word_of, form_count, len(numbers)).astype(np.int64)
    return Vocabulary(side.forms, form_count, word_of, count)


def _frequent_words(vocabulary: Vocabulary, min_count: int) -> NDArray[np.int32]:
    return np.flatnonzero(vocabulary.count >= min_count).astype(np.int32)


def _renumber(words: NDArray[np.int32], vocabulary: Vocabulary) -> NDArray[np.int32]:
    """Returns for each form the position of its word in `words`, plus 1; `_RARE` if it is not there `[F]`."""
    position = np.full(len(vocabulary.count), _RARE, dtype=np.int32)
    position[words] = np.arange(1, len(words) + 1)
    return position[vocabulary.word_of]


def _covered(vocabulary: Vocabulary, words: NDArray[np.int32]) -> float:
    return float(vocabulary.count[np.unique(words)].sum() / vocabulary.count.sum())


def _lines(found: Translations, source: Vocabulary, target: Vocabulary) -> Iterator[Pair]:
    """Yields the pairs of forms of each pair of words, in descending count.

    The most frequent forms are a pair (`dog`, `Hund`). Any other form of the source that occurs twice has the most
    frequent form of the target with the same capitals (`The`, `Die`), if one occurs twice.
    """
    source_forms, target_forms = source.forms_of(found.source), target.forms_of(found.target)
    for row in np.lexsort((found.target, found.source, -found.probability, -found.expected)).tolist():
        own, others = source_forms[int(found.source[row])], target_forms[int(found.target[row])]
        weight = float(found.probability[row])
        yield Pair(source.forms[own[0]], target.forms[others[0]], weight)
        usual: dict[str, str] = {}
        for form in others:
            if target.form_count[form] >= _LEAST_FORM_COUNT:
                usual.setdefault(_capitals(target.forms[form]), target.forms[form])
        for form in own[1:]:
            translation = usual.get(_capitals(source.forms[form]))
            if source.form_count[form] >= _LEAST_FORM_COUNT and translation is not None:
                yield Pair(source.forms[form], translation, weight)


def _capitals(form: str) -> str:
    """Returns `lower`, `capitalised`, `upper` or `mixed`, by the letters of `form`."""
    if form == form.lower():
        return "lower"
    if form[1:] == form[1:].lower():
        return "capitalised"
    return "upper" if form == form.upper() else "mixed"
