"""The words of a step: which are drawn, and that every layout draws the same."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from word_table import Word, word_table
from workers import WorkerError, WorkerPool

LANGUAGES = ("en", "de", "zh")
VOCAB_SIZE = 400
MAX_TOKENS = 3


def groups() -> list[list[Word]]:
    """24 groups; group g has ids from 10 g + 10 on, so that a drawn word tells where it comes from."""
    made: list[list[Word]] = []
    for number in range(24):
        first = 10 * number + 10
        words: list[Word] = [("en", [first]), ("de", [first + 1, first + 2])]
        if number % 3 == 0:
            words.append(("de", [first + 3]))
        if number % 4 != 3:
            words.append(("zh", [first + 4, first + 5, first + 6]))
        made.append(words)
    made[5][1] = ("de", [61, 62, 63, 64])
    # From here on nothing can be drawn: no second language, or only words that are too long.
    made[20] = [("en", [210]), ("en", [211])]
    made[21] = [("en", [220, 221, 222, 223]), ("de", [224])]
    made[22] = [("en", [230]), ("de", [231, 232, 233, 234])]
    return made


# Index, so that group 23, the last of the table, is drawn too.
UNDRAWABLE = {20, 21, 22}
HELD_OUT = {2, 7, 23}


@dataclass
class Drawn:
    """A batch as plain values."""

    tokens: torch.Tensor
    positions: torch.Tensor
    pooling: torch.Tensor
    every: torch.Tensor
    own: torch.Tensor
    pairs: float
    global_tokens: int


def draw(
    steps: list[int], ranks: int, seed: int = 3, groups_per_step: int = 8, multiple: int = 1, held_out: bool = True
) -> list[list[Drawn]]:
    """Runs in a worker: for each step the batch of each rank."""
    from megatron_prealign.alignment.words import WordSampler

    made = groups()
    sampler = WordSampler(
        word_table(made, LANGUAGES, vocab_size=VOCAB_SIZE),
        held_out=np.array([held_out and number in HELD_OUT for number in range(len(made))]),
        groups_per_step=groups_per_step,
        max_word_tokens=MAX_TOKENS,
        seed=seed,
    )
    cpu = torch.device("cpu")
    return [
        [
            Drawn(
                batch.tokens,
                batch.position_ids,
                batch.pooling,
                batch.groups.every,
                batch.groups.own,
                batch.groups.pairs.item(),
                batch.global_tokens,
            )
            for rank in range(ranks)
            for batch in [sampler.draw(step, rank=rank, ranks=ranks, multiple=multiple, device=cpu)]
        ]
        for step in steps
    ]


def words_of(batch: Drawn) -> list[list[int]]:
    """The words of a batch by their pooling weights; an empty list for an empty slot."""
    return [
        [int(token) for token, weight in zip(tokens, pooling, strict=True) if weight > 0]
        for tokens, pooling in zip(batch.tokens, batch.pooling, strict=True)
    ]


def groups_of(batch: Drawn) -> list[int]:
    """The table's groups in the order of the batch."""
    words = words_of(batch)
    found = []
    for start in range(0, len(words), len(LANGUAGES)):
        numbers = {(word[0] - 10) // 10 for word in words[start : start + len(LANGUAGES)] if word}
        assert len(numbers) == 1
        found.append(numbers.pop())
    return found


@pytest.fixture(scope="module")
def batches(workers: WorkerPool) -> list[Drawn]:
    """60 steps in one process."""
    return [ranks[0] for ranks in workers.run(1, draw, list(range(60)), 1)[0]]


def test_held_out_and_undrawable_groups_never_come_all_others_do(batches: list[Drawn]) -> None:
    # With 18 groups and 60 draws of 8, one that may come stays away with a chance of 18 * (10/18)^60 < 1e-14.
    seen = {number for batch in batches for number in groups_of(batch)}
    assert seen == set(range(24)) - HELD_OUT - UNDRAWABLE


def test_last_group_of_the_table_is_drawn(workers: WorkerPool) -> None:
    drawn = workers.run(1, draw, [0], 1, 3, 21, 1, False)[0][0][0]
    assert sorted(groups_of(drawn)) == sorted(set(range(24)) - UNDRAWABLE)


def test_a_group_gives_one_word_of_each_language_it_has(batches: list[Drawn]) -> None:
    made = groups()
    for batch in batches:
        numbers = groups_of(batch)
        assert len(set(numbers)) == len(numbers) == 8
        for place, number in enumerate(numbers):
            slots = range(3 * place, 3 * place + 3)
            for slot, language in zip(slots, LANGUAGES, strict=True):
                choices = [w for code, w in made[number] if code == language and len(w) <= MAX_TOKENS]
                word = words_of(batch)[slot]
                assert (word in choices) if choices else word == []
                assert batch.every[slot] == (place if choices else -1)


def test_each_of_several_translations_comes(batches: list[Drawn]) -> None:
    words = [tuple(word) for batch in batches for word in words_of(batch) if word]
    long, short = words.count((11, 12)), words.count((13,))
    # Both words of group 0, by chance of a half: 26.7 draws expected in 60 steps.
    assert min(long, short) >= 5
    assert words.count((10,)) == long + short


def test_pooling_makes_a_mean_and_padding_is_0(batches: list[Drawn]) -> None:
    for batch in batches:
        for tokens, pooling, word in zip(batch.tokens, batch.pooling, words_of(batch), strict=True):
            assert pooling[: len(word)].tolist() == [float(np.float32(1 / max(len(word), 1)))] * len(word)
            assert torch.count_nonzero(pooling[len(word) :]) == 0
            assert torch.count_nonzero(tokens[len(word) :]) == 0
        width = max(len(word) for word in words_of(batch))
        assert batch.tokens.shape == batch.positions.shape == (24, width)
        assert (batch.positions == torch.arange(width)).all()


def test_counts_of_pairs_and_tokens(batches: list[Drawn]) -> None:
    for batch in batches:
        every = batch.every.tolist()
        pairs = [(i, j) for i, a in enumerate(every) for j, b in enumerate(every) if i != j and a == b and a >= 0]
        assert batch.pairs == len(pairs)
        assert batch.global_tokens == sum(len(word) for word in words_of(batch))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_together_draw_what_one_process_draws(workers: WorkerPool, batches: list[Drawn], ranks: int) -> None:
    steps = [0, 1, 17]
    for step, parts in zip(steps, workers.run(1, draw, steps, ranks)[0], strict=True):
        whole = batches[step]
        for name in ("tokens", "positions", "pooling", "own"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
        for part in parts:
            assert torch.equal(part.every, whole.every)
            assert (part.pairs, part.global_tokens) == (whole.pairs, whole.global_tokens)


def test_step_and_seed_decide(workers: WorkerPool, batches: list[Drawn]) -> None:
    # Asked in another order, as after a resume.
    for step, (again,) in zip([30, 4], workers.run(1, draw, [30, 4], 1)[0], strict=True):
        assert torch.equal(again.tokens, batches[step].tokens)
        assert torch.equal(again.every, batches[step].every)
    assert len({tuple(groups_of(batch)) for batch in batches}) == len(batches)
    other = workers.run(1, draw, [4], 1, 4)[0][0][0]
    assert groups_of(other) != groups_of(batches[4])


def test_width_is_a_multiple_of_the_tensor_parallel_size(workers: WorkerPool, batches: list[Drawn]) -> None:
    wide = workers.run(1, draw, [0], 1, 3, 8, 4)[0][0][0]
    narrow = batches[0]
    assert wide.tokens.shape == (24, 4)
    assert words_of(wide) == words_of(narrow)
    assert torch.equal(wide.every, narrow.every)


def test_too_few_groups_are_the_users_mistake(workers: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(1, draw, [0], 1, 3, 19)
    kind, message, _ = caught.value.failures[0]
    assert kind == "UserError"
    assert message.startswith("alignment.groups_per_step is 19, but the dictionary has 18 groups with words in two")
    assert "alignment.max_word_tokens (3)" in message
    assert "(of 24)" in message


def test_pad_words(workers: WorkerPool) -> None:
    tokens, pooling = workers.run(1, padded)[0]
    assert tokens.tolist() == [[5, 6, 0], [0, 0, 0], [7, 8, 9]]
    third = float(np.float32(1 / 3))
    assert pooling.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [third, third, third]]


def padded() -> tuple[Any, Any]:
    from megatron_prealign.alignment.words import pad_words

    return pad_words([np.array([5, 6]), np.array([], dtype=np.int64), np.array([7, 8, 9])], 3)
