"""Word pairs out of a table, and word retrieval by nearest neighbour."""

from typing import Any

import numpy as np
import pytest
import torch
from model_builds import build, disturb, recipe_values
from word_table import Word, word_table
from workers import WorkerPool

LANGUAGES = ("en", "de", "zh")
LAYERS = 4

GROUPS: list[list[Word]] = [
    [("en", [1]), ("de", [2]), ("zh", [3])],
    # Shares its German word with the group before.
    [("en", [4]), ("de", [2]), ("de", [5]), ("zh", [6])],
    # The first German word is too long, the second is taken.
    [("en", [7]), ("de", [8, 9, 10, 11]), ("de", [12, 13])],
    # The source word is too long: no pair.
    [("en", [14, 15, 16, 17]), ("de", [18]), ("zh", [19])],
    # Another source language.
    [("de", [20]), ("en", [21])],
    [("en", [22]), ("zh", [23])],
]
COUNTS = [5, 9, 5, 100, 0, 7]
Pairs = dict[str, tuple[list[list[int]], list[list[int]], list[int]]]


def pairs_of(groups: list[bool], limit: int) -> Pairs:
    """Runs in a worker: name -> sources, targets, target ids."""
    from megatron_prealign.evaluation.retrieval import word_pairs

    table = word_table(GROUPS, LANGUAGES, vocab_size=40, counts=COUNTS)
    found = word_pairs(table, np.array(groups), limit=limit, max_word_tokens=3)
    return {
        each.name: (
            [word.tolist() for word in each.source],
            [word.tolist() for word in each.target],
            each.target_id.tolist(),
        )
        for each in found
    }


def test_pairs_by_frequency_then_table_order(workers: WorkerPool) -> None:
    pairs = workers.run(1, pairs_of, [True] * 6, 100)[0]
    assert pairs == {
        # Group 1 (9 times), then 0 and 2 (5 times each); both words for [2] find it.
        "en-de": ([[4], [1], [7]], [[2], [2], [12, 13]], [0, 0, 1]),
        "en-zh": ([[4], [22], [1]], [[6], [23], [3]], [0, 1, 2]),
        "de-en": ([[20]], [[21]], [0]),
    }


def test_limit_counts_for_each_language_pair(workers: WorkerPool) -> None:
    pairs = workers.run(1, pairs_of, [True] * 6, 1)[0]
    assert {name: sources for name, (sources, _, _) in pairs.items()} == {
        "en-de": [[4]],
        "en-zh": [[4]],
        "de-en": [[20]],
    }


def test_only_the_asked_groups_give_pairs(workers: WorkerPool) -> None:
    held_out = [True, False, False, True, False, True]
    pairs = workers.run(1, pairs_of, held_out, 100)[0]
    assert pairs == {"en-de": ([[1]], [[2]], [0]), "en-zh": ([[22], [1]], [[23], [3]], [0, 1])}
    rest = workers.run(1, pairs_of, [not each for each in held_out], 100)[0]
    # Ids are given anew: they only tell targets of one list apart.
    assert rest["en-de"] == ([[4], [7]], [[2], [12, 13]], [0, 1])
    assert workers.run(1, pairs_of, [False] * 6, 100)[0] == {}


def random_pairs() -> Any:
    """Two language pairs of words of one to three tokens, some with a target in common."""
    from megatron_prealign.evaluation.retrieval import WordPairs

    random = np.random.default_rng(5)

    def words(count: int) -> list[np.ndarray]:
        return [random.integers(0, 40, size=random.integers(1, 4)).astype(np.int32) for _ in range(count)]

    made = []
    for name, count in (("en-de", 13), ("en-zh", 6)):
        source, target = words(count), words(count)
        target[1] = target[0]
        numbers: dict[tuple[int, ...], int] = {}
        ids = np.array([numbers.setdefault(tuple(each.tolist()), len(numbers)) for each in target])
        # Half of the sources are near their targets: they share all tokens but the order.
        for index in range(0, count, 2):
            source[index] = target[index][::-1].copy()
        made.append(WordPairs(name=name, source=source, target=target, target_id=ids))
    return made


def retrieval(values: dict[str, Any], microbatch: int) -> dict[str, list[float]]:
    """Runs in workers: what the product measures, with small microbatches."""
    from megatron_prealign.evaluation import retrieval as module

    module._WORDS_PER_MICROBATCH, before = microbatch, module._WORDS_PER_MICROBATCH
    try:
        _, runtime, chunks = build(values)
        for chunk in chunks:
            chunk.train()
        measured = module.retrieval_p_at_1(runtime, chunks, random_pairs(), num_layers=LAYERS)
        assert all(chunk.training for chunk in chunks)
        assert module.retrieval_p_at_1(runtime, chunks, [], num_layers=LAYERS) == {}
    finally:
        module._WORDS_PER_MICROBATCH = before
    return measured


def by_hand(values: dict[str, Any]) -> dict[str, list[float]]:
    """Runs in a worker: each word alone through the model, then the nearest target by two loops."""
    _, _, (chunk,) = build(values)
    chunk.eval()
    outputs: list[torch.Tensor] = []
    modules = [chunk.embedding, *chunk.decoder.layers[:-1], chunk.decoder.final_layernorm]
    for module in modules:
        module.register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )

    def states(word: np.ndarray) -> list[torch.Tensor]:
        outputs.clear()
        ids = torch.from_numpy(word.astype(np.int64))[None]
        with torch.no_grad():
            chunk(ids, torch.arange(ids.shape[1])[None], None)
        rows = chunk.output_layer.weight.detach()[ids[0]]
        return [each[:, 0].double().mean(0) for each in outputs] + [rows.double().mean(0)]

    found = {}
    for pair in random_pairs():
        sources, targets = [[states(word) for word in words] for words in (pair.source, pair.target)]
        shares = []
        for layer in range(LAYERS + 2):
            hits = 0
            for index, source in enumerate(sources):
                cosines = [torch.cosine_similarity(source[layer], each[layer], dim=0).item() for each in targets]
                hits += pair.target_id[int(np.argmax(cosines))] == pair.target_id[index]
            shares.append(round(hits / len(sources), 6))
        found[pair.name] = shares
    return found


@pytest.fixture(scope="module")
def expected(workers: WorkerPool) -> dict[str, list[float]]:
    shares = workers.run(1, by_hand, recipe_values("llama"))[0]
    # A measure that is always 0 or 1 would prove nothing.
    assert all(0 < share < 1 for share in shares["en-de"])
    return shares


@pytest.mark.parametrize(
    ("ranks", "parallel", "microbatch"),
    [
        (1, {}, 256),
        (1, {}, 5),
        (2, {}, 256),
        (2, {}, 4),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 16),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 256),
    ],
    ids=["one", "microbatches", "dp2", "dp2_microbatches", "vpp2", "sp_tp2"],
)
def test_share_of_found_translations(
    workers: WorkerPool, expected: dict[str, list[float]], ranks: int, parallel: dict[str, Any], microbatch: int
) -> None:
    values = recipe_values("llama", parallel={"device": "cpu", **parallel})
    for measured in workers.run(ranks, retrieval, values, microbatch):
        assert measured == expected


def shared_targets() -> list[float]:
    """Runs in a worker: two sources with one target in common, whose states are exactly equal."""
    from megatron_prealign.evaluation.retrieval import WordPairs, retrieval_p_at_1

    _, runtime, chunks = build(recipe_values("llama"))
    disturb(chunks[0])
    words = [np.array([number], dtype=np.int32) for number in range(4)]
    pair = WordPairs(
        name="en-de",
        # Each source is a target's own word: the nearest one is itself, or its double under another place.
        source=[words[0], words[0], words[1], words[2]],
        target=[words[0], words[0], words[1], words[3]],
        target_id=np.array([0, 0, 1, 2]),
    )
    return retrieval_p_at_1(runtime, chunks, [pair], num_layers=LAYERS)["en-de"]


def test_a_shared_target_counts_for_all_its_words(workers: WorkerPool) -> None:
    # Word 2 cannot find its target 3 in every layer by chance; words 0 and 1 find theirs in all.
    shares = workers.run(1, shared_targets)[0]
    assert len(shares) == LAYERS + 2
    assert set(shares) <= {0.75, 1.0}
