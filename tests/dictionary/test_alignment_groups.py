"""Which words and groups of a table the alignment phase can draw, against plain loops."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.word_table import Word, word_table

from megatron_prealign.dictionary.alignment_groups import AlignmentGroups, alignment_groups
from megatron_prealign.dictionary.table import DictionaryTable
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import AlignmentSection

LANGUAGES = ("en", "de", "zh", "fr")
MAX_TOKENS = 3


def section(**fields: Any) -> AlignmentSection:
    return AlignmentSection(
        **{"train_iters": 1, "words_per_step": 2, "lr": 0.001, "max_word_tokens": MAX_TOKENS, **fields}
    )


def some_groups(seed: int, count: int = 200) -> list[list[Word]]:
    """Random groups: two to seven words, of which several may be of one language or too long."""
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
    """Frequency of each group and its places: language and words of the table."""
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
    groups: list[list[Word]], counts: Sequence[int], held_out: np.ndarray, wanted: Sequence[str]
) -> tuple[list[Any], list[int]]:
    """What `read` must find, and the words that are too long."""
    drawable, too_long, number = [], [], 0
    for group, words in enumerate(groups):
        places: dict[str, list[int]] = {}
        for language, tokens in words:
            if language in wanted and not held_out[group]:
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
def test_groups_are_those_of_plain_loops(seed: int, weights: dict[str, float]) -> None:
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
    # Several words of one language are among them.
    assert any(len(words) > 1 for _, places in drawable for _, words in places)


def test_last_group_and_last_word_are_not_forgotten() -> None:
    groups: list[list[Word]] = [[("en", [1]), ("de", [2])], [("de", [3]), ("de", [6])], [("fr", [4]), ("en", [5])]]
    found = alignment_groups(table_of(groups), section(words_per_step=4), held_out=nothing_held_out(groups))
    assert read(found) == [(0, [("en", [0]), ("de", [1])]), (0, [("en", [5]), ("fr", [4])])]


@pytest.mark.parametrize(("limit", "words"), [(None, 9), (2, 6), (3, 8), (4, 9)])
def test_a_step_may_take_all_words_of_one_draw_and_no_more(limit: int | None, words: int) -> None:
    """Groups of two, three and four languages; two words of one language are drawn one at a time."""
    groups: list[list[Word]] = [
        [("en", [1]), ("de", [2]), ("de", [3])],
        [("en", [4]), ("de", [5]), ("zh", [6])],
        [("en", [7]), ("de", [8]), ("zh", [9]), ("fr", [10])],
    ]
    held_out = nothing_held_out(groups)
    alignment_groups(table_of(groups), section(words_per_step=words, languages_per_group=limit), held_out=held_out)
    with pytest.raises(UserError) as caught:
        alignment_groups(
            table_of(groups), section(words_per_step=words + 1, languages_per_group=limit), held_out=held_out
        )
    assert str(caught.value) == (
        f"alignment.words_per_step is {words + 1}, but one draw can take {words} words: of 3 groups in the "
        "dictionary, 3 are left with words in two languages of at most alignment.max_word_tokens (3) tokens outside "
        "the held-out share; lower it or build a larger table"
    )


def test_no_group_left() -> None:
    groups: list[list[Word]] = [[("en", [1]), ("de", [2])], [("en", [3]), ("de", [4] * 4)], [("zh", [5]), ("zh", [6])]]
    with pytest.raises(UserError) as caught:
        alignment_groups(table_of(groups), section(), held_out=np.array([True, False, False]))
    assert str(caught.value) == (
        "no group is left to align: of 3 groups in the dictionary, none has been found with words in two languages of "
        "at most alignment.max_word_tokens (3) tokens outside the held-out share; raise alignment.max_word_tokens, or "
        "check the languages of the dictionary and of alignment.language_weights"
    )


def test_language_that_the_table_lacks() -> None:
    groups = some_groups(1, 10)
    weights = {"en": 1.0, "xx": 1.0, "ab": 1.0}
    with pytest.raises(UserError) as caught:
        alignment_groups(table_of(groups), section(language_weights=weights), held_out=nothing_held_out(groups))
    assert str(caught.value) == (
        "alignment.language_weights names ab, xx, but the dictionary is of en, de, zh, fr; correct the codes or build "
        "the dictionary with these languages"
    )


def test_frequency_needs_a_counting_corpus() -> None:
    groups = some_groups(1, 10)
    held_out = nothing_held_out(groups)
    with pytest.raises(UserError) as caught:
        alignment_groups(table_of(groups), section(frequency_exponent=0.5), held_out=held_out)
    assert str(caught.value) == (
        "alignment.frequency_exponent is 0.5, but the dictionary was built without a counting corpus; set it to 0 or "
        "build the dictionary with --corpus"
    )
    counted = table_of(groups, [1, *[0] * 9])
    alignment_groups(counted, section(frequency_exponent=0.5), held_out=held_out)


@pytest.mark.parametrize(("weights", "there", "names"), [({}, 3, "en, de, fr"), ({"en": 1.0, "fr": 1.0}, 2, "en, fr")])
def test_more_languages_than_there_are(weights: dict[str, float], there: int, names: str) -> None:
    groups: list[list[Word]] = [[("en", [1]), ("de", [2]), ("fr", [3])]] * 2
    table = word_table(groups, ("en", "de", "fr"), vocab_size=10)
    settings = section(words_per_step=4, languages_per_group=there + 1, language_weights=weights)
    with pytest.raises(UserError) as caught:
        alignment_groups(table, settings, held_out=nothing_held_out(groups))
    assert str(caught.value) == (
        f"alignment.languages_per_group is {there + 1}, but only {there} languages are drawn from ({names}); lower it, "
        "or leave it out to take all"
    )
