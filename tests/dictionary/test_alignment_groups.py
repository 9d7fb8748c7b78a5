"""Words and groups that the alignment phase can draw, compared with plain loops."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.messages import user_error
from support.word_table import Word, word_table

from megatron_prealign.dictionary.alignment_groups import AlignmentGroups, alignment_groups
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.recipe import AlignmentSection

LANGUAGES = ("en", "de", "zh", "fr")
MAX_TOKENS = 3


def section(**fields: Any) -> AlignmentSection:
    return AlignmentSection(
        **{"train_iters": 1, "words_per_step": 2, "lr": 0.001, "max_word_tokens": MAX_TOKENS, **fields}
    )


def some_groups(seed: int, count: int = 200) -> list[list[Word]]:
    """Random groups of two to seven words; several may be in one language or too long."""
    random = np.random.default_rng(seed)
    groups: list[list[Word]] = [[("en", [1]), ("de", [2])]]
    for number in range(1, count):
        groups.append(
            [
                (str(random.choice(LANGUAGES)), [number] * int(random.integers(1, MAX_TOKENS + 3)))
                for _ in range(random.integers(2, 8))
            ]
        )
    return groups


def table_of(groups: list[list[Word]], counts: Sequence[int] | None = None) -> DictionaryTable:
    return word_table(groups, LANGUAGES, vocab_size=1000, counts=counts)


def nothing_held_out(groups: list[list[Word]]) -> np.ndarray:
    return np.zeros(len(groups), dtype=bool)


def read(found: AlignmentGroups) -> list[tuple[int, list[tuple[str, list[int]]]]]:
    """Frequency and places of each group; a place is a language with its word indices."""
    return [
        (
            int(found.frequency[group]),
            [
                (
                    LANGUAGES[found.language[place]],
                    found.words[found.first[place] : found.first[place] + found.counts[place]].tolist(),
                )
                for place in range(found.place_offsets[group], found.place_offsets[group + 1])
            ],
        )
        for group in range(len(found.frequency))
    ]


def by_loops(
    groups: list[list[Word]], counts: Sequence[int], held_out: np.ndarray, languages: Sequence[str]
) -> tuple[list[Any], list[int]]:
    """Expected result of `read`, and the words that are too long."""
    drawable, too_long, number = [], [], 0
    for group, words in enumerate(groups):
        places: dict[str, list[int]] = {}
        for language, tokens in words:
            if language in languages and not held_out[group]:
                if len(tokens) > MAX_TOKENS:
                    too_long.append(number)
                else:
                    places.setdefault(language, []).append(number)
            number += 1
        if len(places) >= 2:
            drawable.append((counts[group], [(code, places[code]) for code in LANGUAGES if code in places]))
    return drawable, too_long


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weights", [{}, {"en": 1.0, "zh": 1.0}, {"fr": 2.0, "de": 2.0, "en": 2.0}])
def test_groups_equal_plain_loops(seed: int, weights: dict[str, float]) -> None:
    groups = some_groups(seed)
    random = np.random.default_rng(seed + 100)
    counts = random.integers(0, 1000, len(groups)).tolist()
    held_out = random.random(len(groups)) < 0.2
    found = alignment_groups(table_of(groups, counts), section(language_weights=weights), held_out=held_out)
    drawable, too_long = by_loops(groups, counts, held_out, list(weights) or LANGUAGES)
    assert read(found) == drawable
    assert found.too_long.tolist() == too_long
    assert len(drawable) > 10
    assert len(too_long) > 10
    # Some places have several words.
    assert any(len(words) > 1 for _, places in drawable for _, words in places)


def test_last_group_and_last_word_are_included() -> None:
    groups: list[list[Word]] = [[("en", [1]), ("de", [2])], [("de", [3]), ("de", [6])], [("fr", [4]), ("en", [5])]]
    found = alignment_groups(table_of(groups), section(words_per_step=4), held_out=nothing_held_out(groups))
    assert read(found) == [(0, [("en", [0]), ("de", [1])]), (0, [("en", [5]), ("fr", [4])])]


@pytest.mark.parametrize(("limit", "words"), [(None, 9), (2, 6), (3, 8), (4, 9)])
def test_a_step_takes_at_most_all_words_of_one_draw(limit: int | None, words: int) -> None:
    """Groups of two, three and four languages; of two words of one language, one is drawn."""
    groups: list[list[Word]] = [
        [("en", [1]), ("de", [2]), ("de", [3])],
        [("en", [4]), ("de", [5]), ("zh", [6])],
        [("en", [7]), ("de", [8]), ("zh", [9]), ("fr", [10])],
    ]
    held_out = nothing_held_out(groups)
    alignment_groups(table_of(groups), section(words_per_step=words, languages_per_group=limit), held_out=held_out)
    with user_error(f"alignment.words_per_step is {words + 1}", words, "3 of 3 groups", "max_word_tokens = 3"):
        alignment_groups(
            table_of(groups), section(words_per_step=words + 1, languages_per_group=limit), held_out=held_out
        )


def test_no_usable_group() -> None:
    groups: list[list[Word]] = [[("en", [1]), ("de", [2])], [("en", [3]), ("de", [4] * 4)], [("zh", [5]), ("zh", [6])]]
    with user_error("no groups", "0 of 3 groups", "max_word_tokens = 3", "alignment.language_weights"):
        alignment_groups(table_of(groups), section(), held_out=np.array([True, False, False]))


def test_languages_missing_in_the_table() -> None:
    groups = some_groups(1, 10)
    weights = {"en": 1.0, "xx": 1.0, "ab": 1.0}
    with user_error("alignment.language_weights has ab, xx,", "en, de, zh, fr"):
        alignment_groups(table_of(groups), section(language_weights=weights), held_out=nothing_held_out(groups))


def test_frequency_needs_a_counting_corpus() -> None:
    groups = some_groups(1, 10)
    held_out = nothing_held_out(groups)
    with user_error("alignment.frequency_exponent is 0.5", "without a counting corpus", "--corpus"):
        alignment_groups(table_of(groups), section(frequency_exponent=0.5), held_out=held_out)
    counted = table_of(groups, [1, *[0] * 9])
    alignment_groups(counted, section(frequency_exponent=0.5), held_out=held_out)


@pytest.mark.parametrize(("weights", "count", "names"), [({}, 3, "en, de, fr"), ({"en": 1.0, "fr": 1.0}, 2, "en, fr")])
def test_too_many_languages_per_group(weights: dict[str, float], count: int, names: str) -> None:
    groups: list[list[Word]] = [[("en", [1]), ("de", [2]), ("fr", [3])]] * 2
    table = word_table(groups, ("en", "de", "fr"), vocab_size=10)
    settings = section(words_per_step=4, languages_per_group=count + 1, language_weights=weights)
    with user_error(f"alignment.languages_per_group is {count + 1}", f"at most {count}", f"({names})"):
        alignment_groups(table, settings, held_out=nothing_held_out(groups))
