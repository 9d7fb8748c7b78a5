"""The words of a step: which are drawn, how often, and equal draws in every layout."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from support.marks import slow_except
from support.messages import assert_facts
from support.word_draws import (
    ALL_WORDS,
    HELD_OUT,
    UNDRAWABLE,
    USUAL,
    Drawn,
    Setting,
    choices_of,
    draw,
    groups_of,
    number_of,
    pairs_of_words,
)
from support.word_table import Word
from support.workers import WorkerError, WorkerPool


def assert_by_chance(seen: Mapping[Any, int], chances: Mapping[Any, float]) -> None:
    """Pearson's test: fails with probability below 1e-6 if `seen` is drawn with the probabilities `chances`."""
    total = sum(seen.values())
    assert set(seen) <= set(chances)
    assert sum(chances.values()) == pytest.approx(1.0)
    expected = {each: chance * total for each, chance in chances.items()}
    # Below 5 the distribution is not chi-square.
    assert min(expected.values()) > 5
    statistic = sum((seen.get(each, 0) - wanted) ** 2 / wanted for each, wanted in expected.items())
    freedom = len(chances) - 1
    # Wilson and Hilferty's quantile of chi-square; 4.9 is that of the normal distribution at 5e-7.
    limit = freedom * (1 - 2 / (9 * freedom) + 4.9 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit, (statistic, limit, dict(seen), expected)


def one_after_the_other(weights: Mapping[Any, float], size: int) -> dict[tuple[Any, ...], float]:
    """Probability of each order of `size` draws by weight without replacement."""
    chances = {}
    for order in permutations(weights, size):
        chance, remaining = 1.0, sum(weights.values())
        for each in order:
            chance, remaining = chance * weights[each] / remaining, remaining - weights[each]
        chances[order] = chance
    return chances


@pytest.fixture(scope="module")
def batches(workers: WorkerPool) -> list[Drawn]:
    """60 steps in one process."""
    return workers.run(1, draw, USUAL, range(60))[0]


def test_all_groups_but_held_out_and_undrawable_ones_are_drawn(batches: list[Drawn]) -> None:
    # 18 groups and 60 draws of at least 8: a drawable one is missing with a probability of 18 * (10/18)^60 < 1e-14.
    seen = {number for batch in batches for number in groups_of(batch)}
    assert seen == set(range(24)) - HELD_OUT - UNDRAWABLE


def test_last_group_of_the_table_is_drawn(workers: WorkerPool) -> None:
    """A step with as many words as there are draws all groups."""
    all_words = replace(USUAL, held_out=frozenset()).section_with(words_per_step=ALL_WORDS + 3 + 2 + 2)
    drawn = workers.run(1, draw, all_words, [0])[0][0]
    assert sorted(groups_of(drawn)) == sorted(set(range(24)) - UNDRAWABLE)
    assert all(drawn.flat)


def test_a_group_gives_one_word_of_each_language_it_has(batches: list[Drawn]) -> None:
    cut = 0
    for batch in batches:
        slot = 0
        for place, number in enumerate(groups_of(batch)):
            for _, choices in choices_of(USUAL, number):
                if slot < 24 and batch.flat[slot]:
                    assert batch.flat[slot] in choices
                    assert batch.group[slot] == place
                    slot += 1
                else:
                    # Only the last group may be truncated, and not to one word.
                    assert place == len(groups_of(batch)) - 1
                    assert batch.group.count(place) >= 2
                    cut += 1
        assert batch.group[slot:] == [-1] * (24 - slot)
        assert len(set(groups_of(batch))) == len(groups_of(batch)) == len(set(batch.group) - {-1})
    assert cut > 0


@pytest.mark.parametrize("words_per_step", slow_except([2, 3, 5, 8, 13, 25, ALL_WORDS], 2, 13, ALL_WORDS))
@pytest.mark.parametrize("limit", [None, 2, 3])
def test_words_fill_a_step(workers: WorkerPool, words_per_step: int, limit: int | None) -> None:
    """At most one slot is empty, and only if the last word would have no translation in the step."""
    if limit == 2 and words_per_step == ALL_WORDS:
        words_per_step = 2 * 18
    setting = USUAL.section_with(words_per_step=words_per_step, languages_per_group=limit)
    empty = 0
    for drawn in workers.run(1, draw, setting, range(150))[0]:
        assert len(drawn.flat) == words_per_step
        filled = [word for word in drawn.flat if word]
        assert drawn.flat[: len(filled)] == filled
        assert len(filled) >= words_per_step - 1
        assert min(Counter(group for group in drawn.group if group >= 0).values()) >= 2
        empty += len(filled) < words_per_step
    # Groups of three and of two words come in any order; two groups of two come first in at least 6.5 % of the steps.
    assert (empty > 0) == (words_per_step % 2 == 1 if limit == 2 else words_per_step not in (2, ALL_WORDS))


def test_each_of_several_translations_is_drawn(workers: WorkerPool) -> None:
    drawn = workers.run(1, draw, USUAL, range(400))[0]
    words = Counter(tuple(word) for batch in drawn for word in batch.flat if word)
    assert_by_chance({word: words[word] for word in [(11, 12), (13,)]}, {(11, 12): 0.5, (13,): 0.5})


def test_counts_of_pairs_and_tokens(batches: list[Drawn]) -> None:
    for batch in batches:
        group = batch.group
        pairs = [(i, j) for i, a in enumerate(group) for j, b in enumerate(group) if i != j and a == b and a >= 0]
        assert batch.pairs == batch.host_pairs == len(pairs)
        assert batch.positives == [float(sum(i == anchor for i, _ in pairs)) for anchor in range(24)]
        assert batch.tokens == sum(len(word) for word in batch.flat)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("data_size", [1, 2, 4, 8])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_ranks_and_microbatches_together_draw_what_one_process_draws(
    workers: WorkerPool, batches: list[Drawn], data_size: int, microbatches: int, packed: bool
) -> None:
    steps = [0, 1, 17]
    setting = replace(USUAL, data_size=data_size, microbatches=microbatches, packed=packed)
    for step, drawn in zip(steps, workers.run(1, draw, setting, steps)[0], strict=True):
        alone = batches[step]
        assert drawn.flat == alone.flat
        assert [len(parts) for parts in drawn.words] == [microbatches] * data_size
        assert {len(words) for parts in drawn.words for words in parts} == {24 // data_size // microbatches}
        # Without tensor parallelism ranks are gathered in the order of the words.
        assert drawn.group == alone.group
        assert (drawn.pairs, drawn.host_pairs, drawn.tokens) == (alone.pairs, alone.host_pairs, alone.tokens)


@pytest.mark.parametrize(("data_size", "microbatches", "tensor_size"), [(1, 1, 2), (2, 3, 2), (1, 2, 4), (3, 2, 4)])
def test_groups_are_those_of_the_gathered_words(
    workers: WorkerPool, batches: list[Drawn], data_size: int, microbatches: int, tensor_size: int
) -> None:
    setting = replace(USUAL, data_size=data_size, microbatches=microbatches, tensor_size=tensor_size)
    for step, drawn in enumerate(workers.run(1, draw, setting, range(3))[0]):
        assert drawn.flat == batches[step].flat
        gathered: list[list[int]] = []
        for parts in drawn.words:
            for tensor_rank in range(tensor_size):
                for words in parts:
                    size = len(words) // tensor_size
                    gathered += words[tensor_rank * size : (tensor_rank + 1) * size]
        number = {group: place for place, group in enumerate(groups_of(batches[step]))}
        assert drawn.group == [number[number_of(word)] if word else -1 for word in gathered]
        assert drawn.pairs == batches[step].pairs


def test_draws_depend_on_step_and_seed(workers: WorkerPool, batches: list[Drawn]) -> None:
    # In another order, as after a resume.
    for step, again in zip([30, 4], workers.run(1, draw, USUAL, [30, 4])[0], strict=True):
        assert (again.flat, again.group) == (batches[step].flat, batches[step].group)
    assert len({tuple(groups_of(batch)) for batch in batches}) == len(batches)
    (other,) = workers.run(1, draw, replace(USUAL, seed=4), [4])[0]
    assert groups_of(other) != groups_of(batches[4])


def test_width_is_a_multiple_of_the_tensor_parallel_size(workers: WorkerPool, batches: list[Drawn]) -> None:
    for packed, shape in ((True, (1, 65)), (False, (24, 5))):
        (wide,) = workers.run(1, draw, replace(USUAL, packed=packed, multiple=5), [0])[0]
        assert wide.shapes == [shape]
        assert wide.flat == batches[0].flat
        assert wide.group == batches[0].group


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exponent", "counts"),
    [(1.0, [19, 2, 1, 0]), (0.5, [399, 8, 3, 0]), (0.0, [399, 8, 3, 0])],
    ids=["proportional", "square_root", "equal"],
)
def test_groups_are_drawn_by_frequency(workers: WorkerPool, exponent: float, counts: list[int]) -> None:
    """Two of four groups per step. The four draws with replacement are all of the first group in a third of the steps;
    the second group is then drawn in the second stage."""
    setting = Setting(pairs_of_words(4), counts=counts).section_with(words_per_step=4, frequency_exponent=exponent)
    seen = Counter(tuple(groups_of(drawn)) for drawn in workers.run(1, draw, setting, range(2000))[0])
    weights = dict(enumerate([20.0, 3.0, 2.0, 1.0] if exponent else [1.0] * 4))
    assert (20 / 26) ** 4 > 1 / 3
    assert_by_chance(seen, one_after_the_other(weights, 2))


@pytest.mark.slow
def test_a_few_heavy_groups_are_not_repeated(workers: WorkerPool) -> None:
    """Three of five groups, of which two have nearly all of the weight: the third is drawn by its weight."""
    counts = [9999, 9999, 3, 1, 0]
    setting = Setting(pairs_of_words(5), counts=counts).section_with(words_per_step=6, frequency_exponent=1.0)
    drawn = [groups_of(each) for each in workers.run(1, draw, setting, range(3000))[0]]
    assert all(len(each) == 3 for each in drawn)
    third = Counter(each[2] for each in drawn if set(each[:2]) == {0, 1})
    # One of the small groups comes earlier with a probability of about 7 / 10,007 per step.
    assert sum(third.values()) > 2900
    assert_by_chance(third, {2: 4 / 7, 3: 2 / 7, 4: 1 / 7})


@pytest.mark.parametrize("exponent", slow_except([3.0, 60.0], 60.0))
def test_weights_of_any_size_draw_each_group_once(workers: WorkerPool, exponent: float) -> None:
    """The first group's weight is at least 10^18 times the others', so that their float64 sum equals the first."""
    counts = [10**6, 10**6 - 1, 0, 0, 0, 0]
    setting = Setting(pairs_of_words(6), counts=counts)
    setting = setting.section_with(words_per_step=8, frequency_exponent=exponent)
    drawn = [groups_of(each) for each in workers.run(1, draw, setting, range(600))[0]]
    assert all(len(each) == 4 for each in drawn)
    assert all(set(each[:2]) == {0, 1} for each in drawn)
    assert_by_chance(
        Counter(tuple(each[2:]) for each in drawn), one_after_the_other(dict.fromkeys([2, 3, 4, 5], 1.0), 2)
    )


FOUR = ("en", "de", "zh", "fr")


def four_languages(count: int) -> list[list[Word]]:
    return [[(code, [10 * number + 10 + place]) for place, code in enumerate(FOUR)] for number in range(count)]


def languages_of(drawn: Drawn) -> list[tuple[str, ...]]:
    """The languages of each group of `four_languages`, in order."""
    languages: dict[int, tuple[str, ...]] = {}
    for word in drawn.flat:
        if word:
            languages[number_of(word)] = (*languages.get(number_of(word), ()), FOUR[word[0] % 10])
    return list(languages.values())


@pytest.mark.parametrize(
    ("limit", "weights"),
    [(2, {}), (2, {"en": 4.0, "de": 2.0, "zh": 1.0, "fr": 0.5}), (3, {"en": 1.0, "fr": 3.0, "zh": 2.0})],
    ids=["equal", "all", "three"],
)
def test_languages_of_a_group_are_drawn_by_weight(workers: WorkerPool, limit: int, weights: dict[str, float]) -> None:
    setting = Setting(four_languages(10), languages=FOUR).section_with(
        words_per_step=10 * limit, languages_per_group=limit, language_weights=weights
    )
    seen: Counter[tuple[str, ...]] = Counter()
    for drawn in workers.run(1, draw, setting, range(300))[0]:
        assert len(languages_of(drawn)) == 10
        seen.update(languages_of(drawn))
    chances: Counter[tuple[str, ...]] = Counter()
    for order, chance in one_after_the_other(weights or dict.fromkeys(FOUR, 1.0), limit).items():
        # Only the set matters; drawn languages are in the table's order.
        chances[tuple(code for code in FOUR if code in order)] += chance
    if len(chances) == 1:
        assert set(seen) == set(chances)
    else:
        assert_by_chance(seen, chances)


def test_all_languages_are_drawn_if_a_group_has_fewer_than_the_limit(workers: WorkerPool) -> None:
    made = four_languages(4)
    made[1] = made[1][:2]
    made[2] = made[2][1:3]
    weights = {"en": 1.0, "de": 5.0, "zh": 1.0}
    setting = Setting(made, languages=FOUR).section_with(
        words_per_step=10, languages_per_group=3, language_weights=weights
    )
    for drawn in workers.run(1, draw, setting, range(10))[0]:
        languages = dict(zip(groups_of(drawn), languages_of(drawn), strict=True))
        assert languages == {0: ("en", "de", "zh"), 1: ("en", "de"), 2: ("de", "zh"), 3: ("en", "de", "zh")}


def test_too_few_words_are_a_user_error(workers: WorkerPool) -> None:
    workers.run(1, draw, USUAL.section_with(words_per_step=ALL_WORDS), [0])
    with pytest.raises(WorkerError) as caught:
        workers.run(1, draw, USUAL.section_with(words_per_step=ALL_WORDS + 1), [0])
    kind, message, _ = caught.value.failures[0]
    assert kind == "UserError"
    assert "\n" not in message
    assert_facts(message, f"alignment.words_per_step is {ALL_WORDS + 1}", f"at most {ALL_WORDS}", "18 of 24 groups")
    assert_facts(message, "alignment.max_word_tokens = 3")
