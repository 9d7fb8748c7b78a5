"""Word pairs from a table, and retrieval metrics of a model under every layout."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from support.buckets import forget_updates_of_others, separate_buckets
from support.marks import slow_except
from support.messages import user_error
from support.model_builds import build, recipe_values
from support.plain_retrieval import plain_metrics
from support.word_table import Word, word_table
from support.workers import WorkerPool

from megatron_prealign.evaluation.word_pairs import WordPairs, watched_pairs, word_pairs
from megatron_prealign.recipe import AlignmentWatchSection

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
    # The reverse direction: one more pair of the same two languages.
    [("de", [20]), ("en", [21])],
    [("en", [22]), ("zh", [23])],
    # A duplicate pair.
    [("de", [2]), ("en", [1])],
]
COUNTS = [5, 9, 5, 100, 0, 7, 0]


def pairs_of(groups: Sequence[bool], limit: int) -> dict[str, tuple[list[list[int]], list[list[int]], list[list[int]]]]:
    """Name -> sources, targets, links."""
    table = word_table(GROUPS, LANGUAGES, vocab_size=40, counts=COUNTS)
    found = word_pairs(table, np.array(groups), limit=limit, max_word_tokens=3)
    return {
        each.name: (
            [word.tolist() for word in each.source],
            [word.tolist() for word in each.target],
            each.links.tolist(),
        )
        for each in found
    }


def test_pairs_by_frequency_then_table_order() -> None:
    assert pairs_of([True] * 7, 100) == {
        # Group 1 (9 times), then 0 and 2 (5 times each), then 4; words 4 and 1 both mean [2].
        "en-de": ([[4], [1], [7], [21]], [[2], [12, 13], [20]], [[0, 0], [1, 0], [2, 1], [3, 2]]),
        "en-zh": ([[4], [22], [1]], [[6], [23], [3]], [[0, 0], [1, 1], [2, 2]]),
    }


def test_limit_counts_pairs_of_each_two_languages() -> None:
    pairs = pairs_of([True] * 7, 1)
    assert {name: sources for name, (sources, _, _) in pairs.items()} == {"en-de": [[4]], "en-zh": [[4]]}


def test_only_the_requested_groups_give_pairs() -> None:
    held_out = [True, False, False, True, False, True, False]
    assert pairs_of(held_out, 100) == {
        "en-de": ([[1]], [[2]], [[0, 0]]),
        "en-zh": ([[22], [1]], [[23], [3]], [[0, 0], [1, 1]]),
    }
    # The first remaining group determines the direction: group 1.
    rest = pairs_of([not each for each in held_out], 100)
    assert list(rest) == ["en-de", "en-zh"]
    assert pairs_of([number >= 4 for number in range(7)], 100)["de-en"] == (
        [[20], [2]],
        [[21], [1]],
        [[0, 0], [1, 1]],
    )
    assert pairs_of([False] * 7, 100) == {}


def test_names_of_directions() -> None:
    pair = WordPairs.from_pairs(("en", "de"), [((1,), (2,))])
    assert pair.name == "en-de"
    assert pair.directions == ("en-de", "de-en")


@pytest.mark.parametrize(
    ("groups", "advice"),
    [
        ("held_out", ("raise dictionary.held_out_fraction", "alignment_watch.groups to trained")),
        ("trained", ("lower dictionary.held_out_fraction", "add words")),
    ],
)
def test_nothing_to_watch_is_a_user_error(groups: Any, advice: tuple[str, ...]) -> None:
    table = word_table(GROUPS, LANGUAGES, vocab_size=40, counts=COUNTS)
    section = AlignmentWatchSection(interval=1, groups=groups)
    held_out = np.zeros(7, dtype=bool) if groups == "held_out" else np.ones(7, dtype=bool)
    facts = (f"alignment_watch.groups is {groups}", "0 groups", "dictionary table", "at most 7 tokens", *advice)
    with user_error(*facts):
        watched_pairs(table, held_out, section, max_word_tokens=7)


def test_the_watch_uses_its_groups_and_number_of_words() -> None:
    table = word_table(GROUPS, LANGUAGES, vocab_size=40, counts=COUNTS)
    held_out = np.array([True, False, False, False, False, True, False])
    found = {
        groups: [
            len(pair.links)
            for pair in watched_pairs(
                table,
                held_out,
                AlignmentWatchSection(interval=1, words=2, groups=groups),
                max_word_tokens=math.inf,
            )
        ]
        for groups in ("held_out", "trained")
    }
    # Only German has a single held-out group; both languages have more than two trained groups.
    assert found == {"held_out": [1, 2], "trained": [2, 2]}


def random_pairs() -> list[WordPairs]:
    """Two language pairs of words of one to three tokens, some with a target in common and some in both lists."""
    random = np.random.default_rng(5)

    def words(count: int) -> list[tuple[int, ...]]:
        return [tuple(random.integers(0, 40, size=random.integers(1, 4)).tolist()) for _ in range(count)]

    made = []
    shared = words(3)
    for languages, count in ((("en", "de"), 19), (("en", "zh"), 8)):
        source, target = [*shared, *words(count - 3)], words(count)
        target[1] = target[0]
        # Half of the sources are near their targets: they share all tokens but one.
        for index in range(4, count, 2):
            source[index] = (*target[index][:-1], *target[index][:1])
        made.append(WordPairs.from_pairs(languages, zip(source, target, strict=True)))
    return made


def random_sentences() -> list[WordPairs]:
    """23 pairs of sentences of 3 to 90 tokens; more than a row of packed words has, and two with equal tokens."""
    random = np.random.default_rng(6)
    pairs = []
    for length in random.integers(3, 90, size=23):
        source = random.integers(0, 40, size=length)
        # Translations share most of their tokens, in another order.
        target = random.permutation(np.where(random.random(length) < 0.6, source, random.integers(0, 40, size=length)))
        pairs.append((tuple(source.tolist()), tuple(target.tolist())))
    return [WordPairs.from_pairs(("en", "de"), [*pairs, (pairs[3][0], pairs[5][1])])]


def retrieval(values: dict[str, Any], microbatch: int, sentences: bool = False) -> Any:
    """Runs in workers: `measure_retrieval` with small microbatches; with `overlap_param_gather`, while each rank lacks
    the parameters that others have updated."""
    from megatron_prealign.evaluation import retrieval as module
    from megatron_prealign.runtime.engine import wrap_data_parallel

    module._WORDS_PER_MICROBATCH, before = microbatch, module._WORDS_PER_MICROBATCH
    try:
        recipe, runtime, chunks = build(values)
        if recipe.parallel.overlap_param_gather:
            with separate_buckets():
                chunks = wrap_data_parallel(chunks, recipe.parallel)
            for chunk in chunks:
                forget_updates_of_others(chunk)
        for chunk in chunks:
            chunk.train()
        pairs = random_sentences() if sentences else random_pairs()
        measured = module.measure_retrieval(runtime, chunks, pairs, num_layers=LAYERS)
        assert all(chunk.training for chunk in chunks)
        chunks[0].eval()
        module.measure_retrieval(runtime, chunks, random_pairs(), num_layers=LAYERS)
        assert not chunks[0].training
        assert module.measure_retrieval(runtime, chunks, [], num_layers=LAYERS) == {}
    finally:
        module._WORDS_PER_MICROBATCH = before
    return measured


def by_hand(values: dict[str, Any], sentences: bool = False) -> dict[str, list[dict[str, float]]]:
    """Runs in a worker: each word alone through the model; direction -> plain metrics per layer."""
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

    metrics: dict[str, list[dict[str, float]]] = {}
    for pair in random_sentences() if sentences else random_pairs():
        sources, targets = [[states(word) for word in words] for words in (pair.source, pair.target)]
        for layer in range(LAYERS + 2):
            ways = plain_metrics([each[layer] for each in sources], [each[layer] for each in targets], pair.links)
            for direction, way in zip(pair.directions, ways, strict=True):
                metrics.setdefault(direction, []).append(way)
    return metrics


@pytest.fixture(scope="module")
def expected(workers: WorkerPool) -> dict[str, list[dict[str, float]]]:
    metrics = workers.run(1, by_hand, recipe_values("llama"))[0]
    # P@1 of 0 or 1 everywhere would prove nothing.
    for direction in ("en-de", "de-en"):
        assert all(0 < layer["p_at_1"] < 1 for layer in metrics[direction])
    return metrics


# Ranks, layout, words of a microbatch.
LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (1, {}, 256),
    (1, {}, 5),
    (2, {}, 256),
    (2, {}, 4),
    (2, {"overlap_grad_reduce": True, "overlap_param_gather": True}, 256),
    (2, {"pipeline_model_parallel_size": 2}, 16),
    (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, 16),
    (2, {"tensor_model_parallel_size": 2}, 256),
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 256),
    (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 8),
    (4, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, 8),
]


@pytest.mark.parametrize(
    ("ranks", "parallel", "microbatch"),
    slow_except(LAYOUTS, LAYOUTS[1], LAYOUTS[3], LAYOUTS[6]),
    ids=[
        "one",
        "microbatches",
        "dp2",
        "dp2_microbatches",
        "dp2_overlap",
        "pp2",
        "vpp2",
        "tp2",
        "sp_tp2",
        "tp2_pp2",
        "sp_tp2_dp2",
    ],
)
def test_metrics_of_every_layer_and_direction(
    workers: WorkerPool,
    expected: dict[str, list[dict[str, float]]],
    ranks: int,
    parallel: dict[str, Any],
    microbatch: int,
) -> None:
    values = recipe_values("llama", parallel={"device": "cpu", **parallel})
    results = workers.run(ranks, retrieval, values, microbatch)
    # Bit-identical: ranks that disagree about reaching a goal would deadlock.
    assert all(result == results[0] for result in results)
    assert results[0].keys() == expected.keys() == {"en-de", "de-en", "en-zh", "zh-en"}
    for direction, layers in expected.items():
        for metric, by_layer in results[0][direction].items():
            wanted = [layer[metric] for layer in layers]
            # Ranks of words are equal; cosines are of float32 states, rounded to six digits.
            tolerance = 5e-6 if "cosine" in metric else 1e-6
            assert by_layer == pytest.approx(wanted, abs=tolerance), (direction, metric)


@pytest.fixture(scope="module")
def expected_sentences(workers: WorkerPool) -> dict[str, list[dict[str, float]]]:
    metrics = workers.run(1, by_hand, recipe_values("llama"), True)[0]
    assert all(0 < layer["p_at_1"] < 1 for layer in metrics["en-de"])
    return metrics


SENTENCE_LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (2, {}),
    (2, {"pipeline_model_parallel_size": 2}),
    (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
]


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    slow_except(SENTENCE_LAYOUTS, SENTENCE_LAYOUTS[0], SENTENCE_LAYOUTS[1]),
    ids=["one", "dp2", "pp2", "sp_tp2", "tp2_pp2"],
)
def test_sentences_of_every_layout(
    workers: WorkerPool,
    expected_sentences: dict[str, list[dict[str, float]]],
    ranks: int,
    parallel: dict[str, Any],
) -> None:
    values = recipe_values("llama", parallel={"device": "cpu", **parallel})
    results = workers.run(ranks, retrieval, values, 256, True)
    assert all(result == results[0] for result in results)
    for direction, layers in expected_sentences.items():
        for metric, by_layer in results[0][direction].items():
            # As for words.
            tolerance = 5e-6 if "cosine" in metric else 1e-6
            assert by_layer == pytest.approx([layer[metric] for layer in layers], abs=tolerance), (direction, metric)


def microbatch_shapes(values: dict[str, Any], tokens: list[int], limit: int) -> list[tuple[int, ...]]:
    """Runs in a worker: `[words, longest]` of every microbatch of pairs of words of these numbers of tokens."""
    from megatron_prealign.evaluation import retrieval as module

    _, runtime, chunks = build(values)
    shapes: list[tuple[int, ...]] = []
    collect, before = module.collect_states, module._TOKENS_PER_MICROBATCH

    def recorded(runtime: Any, chunks: Any, layout: Any, batches: Any, **options: Any) -> Any:
        shapes.extend(tuple(batch.word_tokens.shape) for batch in batches)
        return collect(runtime, chunks, layout, batches, **options)

    module.collect_states, module._TOKENS_PER_MICROBATCH = recorded, limit
    random = np.random.default_rng(7)
    words = [tuple(random.integers(0, 40, size=length).tolist()) for length in tokens]
    try:
        half = len(words) // 2
        pairs = WordPairs.from_pairs(("en", "de"), zip(words[:half], words[half:], strict=True))
        module.measure_retrieval(runtime, chunks, [pairs], num_layers=LAYERS)
    finally:
        module.collect_states, module._TOKENS_PER_MICROBATCH = collect, before
    return shapes


def test_tokens_limit_a_microbatch(workers: WorkerPool) -> None:
    """256 words of up to eight tokens, or as many sentences as have that many tokens with padding."""
    values = recipe_values("llama")
    assert workers.run(1, microbatch_shapes, values, [8] * 512, 8192)[0] == [(256, 8)] * 2
    assert workers.run(1, microbatch_shapes, values, [128, *[9] * 29], 2048)[0] == [(15, 128)] * 2
    assert workers.run(1, microbatch_shapes, values, [128, *[9] * 29], 8192)[0] == [(30, 128)]
    assert workers.run(1, microbatch_shapes, values, [100, 2], 99)[0] == [(1, 100)] * 2


def entries_in_both_directions(values: dict[str, Any]) -> tuple[Any, Any]:
    """Runs in a worker: two lists of different pairs in opposite directions, measured together and one by one."""
    from megatron_prealign.evaluation import retrieval as module

    _, runtime, chunks = build(values)
    first, second = random_sentences()[0], random_pairs()[0]
    both = [first, WordPairs(("de", "en"), second.target, second.source, second.links[:, ::-1].copy())]
    alone = {
        pair.name: module.measure_retrieval(runtime, chunks, [pair], num_layers=LAYERS)[pair.name] for pair in both
    }
    return module.measure_retrieval(runtime, chunks, both, num_layers=LAYERS), alone


def test_each_direction_is_measured_on_its_own_entry(workers: WorkerPool) -> None:
    together, alone = workers.run(1, entries_in_both_directions, recipe_values("llama"))[0]
    assert alone["en-de"]["p_at_1"] != alone["de-en"]["p_at_1"]
    assert {name: each["p_at_1"] for name, each in together.items()} == {
        name: pytest.approx(each["p_at_1"], abs=1e-6) for name, each in alone.items()
    }
