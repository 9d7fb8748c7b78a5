"""Assignment of words to ranks against a plain implementation; all ranks together have the states of all words."""

from typing import Any

import numpy as np
import pytest
import torch
from support.marks import slow_except
from support.model_builds import VOCAB_SIZE, build, recipe_values
from support.workers import WorkerPool

LAYERS = 4
TP2, PP2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}


def layout(data_size: int, tensor_size: int, data_rank: int = 0, packed: bool = True) -> Any:
    from megatron_prealign.alignment.layout import WordLayout

    return WordLayout(
        data_size=data_size,
        tensor_size=tensor_size,
        data_rank=data_rank,
        packed=packed,
        multiple=1,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def gathered_by_hand(words: list[int], data_size: int, microbatches: int, tensor_size: int) -> list[int]:
    """Data rank d has the d-th part of the words, split into microbatches; tensor rank t has the t-th part of each.
    Tensor ranks are gathered next to each other, each with its microbatches in order."""

    def part(of: list[int], number: int, parts: int) -> list[int]:
        size = len(of) // parts
        return of[number * size : (number + 1) * size]

    gathered: list[int] = []
    for data_rank in range(data_size):
        for tensor_rank in range(tensor_size):
            for microbatch in range(microbatches):
                own = part(part(words, data_rank, data_size), microbatch, microbatches)
                gathered += part(own, tensor_rank, tensor_size)
    return gathered


def by_rank(data_size: int, microbatches: int, tensor_size: int, words: list[int]) -> list[int]:
    """Runs in a worker."""
    return layout(data_size, tensor_size).by_rank(np.array(words), microbatches).tolist()


@pytest.mark.parametrize(
    ("data_size", "microbatches", "tensor_size"),
    [(1, 1, 1), (4, 1, 1), (1, 3, 1), (1, 1, 2), (2, 3, 1), (2, 1, 4), (1, 3, 2), (2, 3, 4), (3, 2, 2)],
)
def test_order_in_which_ranks_are_gathered(
    workers: WorkerPool, data_size: int, microbatches: int, tensor_size: int
) -> None:
    words = np.random.default_rng(1).permutation(5 * data_size * microbatches * tensor_size).tolist()
    order = workers.run(1, by_rank, data_size, microbatches, tensor_size, words)[0]
    assert order == gathered_by_hand(words, data_size, microbatches, tensor_size)


def own_words(data_size: int, microbatches: int, packed: bool) -> list[list[list[list[int]]]]:
    """Runs in a worker: each word's tokens by data-parallel rank and microbatch."""
    lengths = np.random.default_rng(1).integers(0, 5, 24)
    tokens = np.arange(24 * 4).reshape(24, 4) + 1
    return [
        [
            [
                row[: int((weights > 0).sum())].tolist()
                for row, weights in zip(batch.word_tokens, batch.weights, strict=True)
            ]
            for batch in layout(data_size, 1, data_rank, packed).batches(tokens, lengths, microbatches)
        ]
        for data_rank in range(data_size)
    ]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("data_size", "microbatches"), [(1, 1), (4, 1), (1, 6), (2, 3), (3, 4)])
def test_batches_of_a_rank_are_its_part_in_order(
    workers: WorkerPool, data_size: int, microbatches: int, packed: bool
) -> None:
    ranks = workers.run(1, own_words, data_size, microbatches, packed)[0]
    assert [len(batches) for batches in ranks] == [microbatches] * data_size
    assert {len(words) for batches in ranks for words in batches} == {24 // data_size // microbatches}
    ((all_words,),) = workers.run(1, own_words, 1, 1, packed)[0]
    assert [word for batches in ranks for words in batches for word in words] == all_words
    assert len({len(word) for word in all_words}) == 5


def collected(values: dict[str, Any], slots: int, microbatches: int) -> tuple[int, dict[int, torch.Tensor], list[int]]:
    """Runs in workers: index of this rank in its stage, its words' states by layer, and which words these must be."""
    from megatron_prealign.alignment.layout import WordLayout, collect_states

    recipe, runtime, chunks = build(values)
    random = np.random.default_rng(1)
    lengths = random.integers(0, 5, slots)
    # Two rows, while other microbatches of words have one: pipeline stages must communicate the shape.
    lengths[:8] = 12
    lengths[3] = 0
    tokens = random.integers(0, VOCAB_SIZE, (slots, 12))
    word_layout = WordLayout.of(runtime, chunks)
    assert word_layout.packed
    batches = word_layout.batches(tokens, lengths, microbatches)
    layers = {0, *range(2, LAYERS + 2)}
    states = collect_states(runtime, chunks, word_layout, batches, num_layers=LAYERS, layers=layers)
    assert all(not state.requires_grad and state.dtype is torch.float32 for state in states.values())
    group = runtime.groups.tp_dp_cp
    order = word_layout.by_rank(np.arange(slots), microbatches)
    return group.rank(), states, np.split(order, group.size())[group.rank()].tolist()


@pytest.mark.parametrize(
    ("ranks", "parallel", "microbatches"),
    slow_except(
        [
            (2, {}, 1),
            (2, TP2, 1),
            (2, {**TP2, "sequence_parallel": True}, 3),
            (2, PP2, 3),
            (2, VPP2, 3),
            (4, TP2, 3),
            (4, {**TP2, "sequence_parallel": True}, 1),
            (4, {**TP2, **PP2}, 3),
        ],
        (2, {}, 1),
        (2, {**TP2, "sequence_parallel": True}, 3),
        (2, VPP2, 3),
    ),
    ids=["dp2", "tp2", "sp", "pp2", "vpp2", "tp2_dp2", "sp_dp2", "tp2_pp2"],
)
def test_ranks_together_have_the_states_of_all_words(
    workers: WorkerPool, ranks: int, parallel: dict[str, Any], microbatches: int
) -> None:
    """Tensor-parallel ranks have disjoint parts; a schedule of three microbatches has idle ones at VPP2."""
    values, slots = recipe_values("llama"), 24
    ((_, expected, all_words),) = workers.run(1, collected, values, slots, 1)
    assert sorted(expected) == [0, 2, 3, 4, 5]
    assert all_words == list(range(slots))
    values["parallel"].update(parallel)
    results = workers.run(ranks, collected, values, slots, microbatches)
    stages = parallel.get("pipeline_model_parallel_size", 1)
    by_index = {index: words for index, _, words in results}
    assert sorted(word for words in by_index.values() for word in words) == list(range(slots))
    assert all(len(words) == slots * stages // ranks for words in by_index.values())
    seen = {layer: torch.full((slots, 32), torch.nan) for layer in expected}
    for _, states, words in results:
        for layer, state in states.items():
            seen[layer][words] = state
    for layer, state in expected.items():
        # Tensor-parallel ranks sum in another order, and words are at other columns.
        torch.testing.assert_close(seen[layer], state, rtol=1e-4, atol=1e-6)
        assert not state[3].any()


def idle() -> dict[str, Any]:
    """Runs in a worker: shapes of the idle batch of a layout with and without packing."""
    shapes: dict[str, Any] = {}
    for packed in (True, False):
        batch = layout(2, 1, packed=packed).idle_batch()
        shapes[str(packed)] = (tuple(batch.tokens.shape), len(batch.weights), int(batch.tokens.sum()))
    return shapes


def test_idle_batch_has_no_words_and_one_row(workers: WorkerPool) -> None:
    assert workers.run(1, idle)[0] == {"True": ((1, 64), 0, 0), "False": ((1, 1), 0, 0)}
