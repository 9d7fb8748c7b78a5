"""Layer taps: the observed states, cleanup, and the gradients of the attached losses."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from support.huggingface_weights import llama
from support.marks import slow_except
from support.model_builds import SEQ_LENGTH, build, perturb, recipe_values, states_by_hand, tokens, weights
from support.workers import WorkerPool

LAYERS = 4
# Words of one to four tokens and an empty slot.
WORDS = [[3, 17, 5], [9], [], [22, 4, 31, 8], [30, 2], [39]]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def word_batch(*, packed: bool = True, multiple: int = 1, words: list[list[int]] | None = None) -> Any:
    from megatron_prealign.alignment.packing import lay_out_words

    words = WORDS if words is None else words
    tokens = np.zeros((len(words), max(map(len, words), default=1)), dtype=np.int64)
    for row, word in zip(tokens, words, strict=True):
        row[: len(word)] = word
    return lay_out_words(
        tokens,
        np.array([len(word) for word in words], dtype=np.int64),
        packed=packed,
        multiple=multiple,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def tapped(values: dict[str, Any], packed: bool = True) -> tuple[Any, Any, Any]:
    """A model with all weights randomised, its taps and a word batch."""
    from megatron_prealign.alignment.taps import LayerTaps

    recipe, runtime, chunks = build(values)
    for chunk in chunks:
        # The same random numbers in TP2 shards would be a different model, so only single-process models are disturbed.
        if runtime.world_size == 1:
            perturb(chunk)
    multiple = 2 if recipe.parallel.sequence_parallel else 1
    return chunks[0], LayerTaps(chunks, runtime, LAYERS), word_batch(packed=packed, multiple=multiple)


def observed_states(
    values: dict[str, Any], packed: bool = True
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor]]:
    """Runs in workers: the model's weights, and the states of this rank's words by layer."""
    chunk, taps, batch = tapped(values, packed)
    states: dict[int, torch.Tensor] = {}
    with torch.no_grad(), taps.observing(lambda layer, words, _: states.update({layer: words.clone()})):
        taps.run_words(chunk, chunk, batch)
    return weights(chunk), states


def before_and_after() -> dict[str, Any]:
    """Runs in a worker: hooks and outputs before, inside and after a `with` block."""
    chunk, taps, batch = tapped(recipe_values("llama"))
    rows = tokens()
    positions = torch.arange(SEQ_LENGTH).expand_as(rows)
    calls: list[int] = []
    computed: list[Any] = []
    counting = chunk.output_layer.register_forward_hook(lambda module, args, output: computed.append(output[0].shape))

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in chunk.modules()) - 1

    results: dict[str, Any] = {"before": hooks()}
    with torch.no_grad():
        plain = chunk(rows, positions, None)
        computed.clear()
        with taps.observing(lambda layer, words, _: calls.append(layer)):
            results["inside"] = hooks()
            hidden = taps.run_words(chunk, chunk, batch)
            results["word_calls"] = calls.copy()
            results["word_output"] = tuple(hidden.shape)
            results["logits_of_words"] = len(computed)
            calls.clear()
            results["rows_equal"] = torch.equal(chunk(rows, positions, None), plain)
            results["row_calls"] = calls.copy()
            idle = word_batch(words=[])
            results["idle_output"] = tuple(taps.run_words(chunk, chunk, idle).shape)
            results["idle_calls"] = calls.copy()
            results["idle_loss"] = taps.output_embedding_loss
            # A mask like that of packed words, but not of a batch registered with the taps.
            results["masked_rows"] = tuple(chunk(idle.tokens, idle.position_ids, idle.attention_mask).shape)
            results["masked_calls"] = calls.copy()
        results["after"] = hooks()
        taps.run_words(chunk, chunk, batch)
        results["calls_after"] = calls.copy()
        try:
            with taps.observing(fail):
                taps.run_words(chunk, chunk, batch)
        except ZeroDivisionError:
            results["after_error"] = (hooks(), chunk.post_process)
        results["rows_equal_after"] = torch.equal(chunk(rows, positions, None), plain)
    counting.remove()
    reference = weakref.ref(batch)
    del batch
    results["batch_is_freed"] = reference() is None
    return results


def fail(layer: int, words: torch.Tensor, batch: Any) -> None:
    raise ZeroDivisionError


def layer_weight(layer: int) -> float:
    return 0.5 + 0.25 * layer


def loss_of(layer: int, words: torch.Tensor) -> torch.Tensor:
    """A loss that differs between layers."""
    return layer_weight(layer) * (words.float() * torch.linspace(-1, 1, words.shape[-1])).tanh().square().sum()


def by_hand(chunk: Any) -> dict[int, torch.Tensor]:
    """The states from a plain forward pass with one word per row."""
    alone = word_batch(packed=False)
    return states_by_hand(chunk, alone.tokens, alone.position_ids, [len(word) for word in WORDS], LAYERS)


def gradients(values: dict[str, Any], packed: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Runs in a worker: every parameter's gradient from attached losses, and from the losses added up by hand."""
    from megatron_prealign.alignment.taps import no_loss

    chunk, taps, batch = tapped(values, packed)

    def take() -> dict[str, torch.Tensor]:
        result = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in chunk.named_parameters()
        }
        chunk.zero_grad(set_to_none=True)
        return result

    def observe(layer: int, words: torch.Tensor, _: Any) -> torch.Tensor | None:
        if not torch.is_grad_enabled():
            return None
        # Layer 2 has no loss, layer 3 a constant one.
        return None if layer == 2 else torch.ones(()) if layer == 3 else loss_of(layer, words)

    with taps.observing(observe):
        output = taps.run_words(chunk, chunk, batch)
        (no_loss(output) + taps.output_embedding_loss).backward()
    attached = take()
    states = by_hand(chunk)
    torch.stack([loss_of(layer, states[layer]) for layer in (0, 1, LAYERS, LAYERS + 1)]).sum().backward()
    return attached, take()


def hand_made(values: dict[str, Any]) -> dict[int, torch.Tensor]:
    chunk, _, _ = tapped(values)
    with torch.no_grad():
        return by_hand(chunk)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_pooled_states_are_means_of_hidden_states(workers: WorkerPool, family: str, tied: bool, packed: bool) -> None:
    values = recipe_values(family, {"share_embeddings_and_output_weights": tied})
    _, states = workers.run(1, observed_states, values, packed)[0]
    expected = workers.run(1, hand_made, values)[0]
    assert sorted(states) == sorted(expected) == list(range(LAYERS + 2))
    for layer, words in states.items():
        assert words.dtype is torch.float32
        # A weighted sum against a mean, and other rotary angles if packed: rounding.
        torch.testing.assert_close(words, expected[layer], rtol=1e-5, atol=1e-6 if not packed else 1e-5)


def test_layers_are_the_hidden_states_of_transformers(workers: WorkerPool) -> None:
    """Each word alone and without padding through transformers' Llama with the same weights."""
    mcore, states = workers.run(1, observed_states, recipe_values("llama"))[0]
    model = llama(mcore, max_position_embeddings=SEQ_LENGTH)
    for slot, word in enumerate(WORDS):
        if not word:
            continue
        with torch.no_grad():
            hidden = model(torch.tensor([word]), output_hidden_states=True).hidden_states
        assert len(hidden) == LAYERS + 1
        for layer, state in enumerate(hidden):
            torch.testing.assert_close(states[layer][slot], state[0].mean(0), **TOLERANCE)
        rows = model.lm_head.weight[word].mean(0)
        torch.testing.assert_close(states[LAYERS + 1][slot], rows, **TOLERANCE)


def test_empty_slots_are_zero(workers: WorkerPool) -> None:
    _, states = workers.run(1, observed_states, recipe_values("llama"))[0]
    for words in states.values():
        assert torch.count_nonzero(words[WORDS.index([])]) == 0
        assert torch.count_nonzero(words) > 0


@pytest.mark.parametrize(
    ("sequence_parallel", "ranks", "packed"),
    slow_except([(False, 2, True), (True, 2, False), (False, 4, False), (True, 4, True)], (True, 2, False)),
)
def test_tensor_parallel_ranks_observe_parts_of_the_states_of_one_process(
    workers: WorkerPool, sequence_parallel: bool, ranks: int, packed: bool
) -> None:
    """The parts are disjoint and in order; data-parallel ranks get the same batch here and see the same."""
    values = recipe_values("llama")
    # With initial weights: `perturb` would give the shards other values.
    ((rank, expected),) = workers.run(1, undisturbed_states, values, packed)
    assert rank == 0
    values["parallel"] = {
        "device": "cpu",
        "tensor_model_parallel_size": 2,
        "sequence_parallel": sequence_parallel,
    }
    results = workers.run(ranks, undisturbed_states, values, packed)
    assert [rank for rank, _ in results] == [0, 1] * (ranks // 2)
    for rank, states in results:
        assert sorted(states) == sorted(expected)
        for layer, words in states.items():
            # Sums over the ranks in another order.
            torch.testing.assert_close(words, expected[layer].chunk(2)[rank], rtol=1e-4, atol=1e-7)


def undisturbed_states(values: dict[str, Any], packed: bool) -> tuple[int, dict[int, torch.Tensor]]:
    """Runs in workers: tensor-parallel rank, and the states of its words by layer."""
    from megatron_prealign.alignment.taps import LayerTaps

    recipe, runtime, chunks = build(values)
    taps = LayerTaps(chunks, runtime, LAYERS)
    states: dict[int, torch.Tensor] = {}
    batch = word_batch(packed=packed, multiple=2 if recipe.parallel.sequence_parallel else 1)
    with torch.no_grad(), taps.observing(lambda layer, words, _: states.update({layer: words.clone()})):
        taps.run_words(chunks[0], chunks[0], batch)
    return runtime.tensor_rank, states


def test_hooks_and_batches_are_removed(workers: WorkerPool) -> None:
    results = workers.run(1, before_and_after)[0]
    # The model has its own hooks.
    assert results["before"] == results["after"]
    # Embedding, every block but the last, and the final norm in its place.
    assert results["inside"] == results["before"] + LAYERS + 1
    assert results["word_calls"] == list(range(LAYERS + 2))
    assert results["calls_after"] == []
    assert results["after_error"] == (results["before"], True)
    assert results["rows_equal_after"]
    assert results["batch_is_freed"]


def test_words_have_no_logits_and_rows_are_not_observed(workers: WorkerPool) -> None:
    results = workers.run(1, before_and_after)[0]
    assert results["logits_of_words"] == 0
    # All words fit into one row of 64 tokens.
    assert results["word_output"] == (64, 1, 32)
    assert results["row_calls"] == []
    assert results["rows_equal"]


def test_batches_without_words_are_not_observed(workers: WorkerPool) -> None:
    results = workers.run(1, before_and_after)[0]
    assert results["idle_output"] == (64, 1, 32)
    assert results["idle_calls"] == []
    assert results["idle_loss"] is None
    # Samples of the blend with document masks have a mask too.
    assert results["masked_rows"][:2] == (1, 64)
    assert results["masked_calls"] == []


def order_of_losses(values: dict[str, Any]) -> list[tuple[int, int]]:
    """Runs in a worker: layer and batch of each observation with a graph, two batches before one backward pass."""
    from megatron_prealign.alignment.taps import no_loss

    chunk, taps, first = tapped(values)
    second = word_batch(words=WORDS[:2])
    number = {id(first): 1, id(second): 2}
    seen: list[tuple[int, int]] = []

    def observe(layer: int, words: torch.Tensor, batch: Any) -> torch.Tensor | None:
        assert len(words) == len(batch.weights)
        if torch.is_grad_enabled():
            seen.append((layer, number[id(batch)]))
        return None

    with taps.observing(observe):
        outputs = [no_loss(taps.run_words(chunk, chunk, batch)) for batch in (first, second)]
        for output in outputs:
            output.backward()
    return seen


@pytest.mark.parametrize("recompute", [None, "full"])
def test_each_batch_is_observed_with_its_own_states(workers: WorkerPool, recompute: str | None) -> None:
    """Recomputed blocks run again in the backward pass, when another batch is in its forward pass."""
    values = recipe_values("llama", {"recompute_granularity": recompute})
    seen = workers.run(1, order_of_losses, values)[0]
    assert sorted(seen) == [(layer, batch) for layer in range(LAYERS + 2) for batch in (1, 2)]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_attached_losses_have_the_gradients_of_their_sum(
    workers: WorkerPool, recompute: str | None, packed: bool
) -> None:
    values = recipe_values("llama", {"recompute_granularity": recompute})
    attached, expected = workers.run(1, gradients, values, packed)[0]
    assert attached.keys() == expected.keys()
    for name, gradient in expected.items():
        # No comparison is trivial because of a zero gradient.
        assert torch.count_nonzero(gradient) > 0, name
        # The same sums in another order.
        torch.testing.assert_close(attached[name], gradient, **TOLERANCE)


def pooled_layers(recompute: str | None, layers: list[int]) -> tuple[list[int], list[int], int]:
    """Runs in a worker: the layers whose words are pooled with and without `needs_graph`, in order, and the number of
    hooks."""
    from megatron_prealign.alignment.taps import no_loss

    chunk, taps, batch = tapped(recipe_values("llama", {"recompute_granularity": recompute}))
    pooled: list[int] = []
    pool = taps._pool
    taps._pool = lambda hidden, batch: (pooled.append(hidden.shape[1]), pool(hidden, batch))[1]
    seen: list[int] = []
    counts = []
    before = sum(len(module._forward_hooks) for module in chunk.modules())
    for needs_graph in (True, False):
        with taps.observing(lambda layer, words, _: seen.append(layer), layers=layers, needs_graph=needs_graph):
            hooks = sum(len(module._forward_hooks) for module in chunk.modules()) - before
            no_loss(taps.run_words(chunk, chunk, batch)).backward()
        # The output embedding is not pooled.
        assert len(pooled) == len([layer for layer in seen if layer <= LAYERS])
        counts.append(seen.copy())
        seen.clear()
        pooled.clear()
    return counts[0], counts[1], hooks


@pytest.mark.parametrize("recompute", [None, "full"])
def test_only_chosen_layers_are_pooled_and_once(workers: WorkerPool, recompute: str | None) -> None:
    with_graph, always, hooks = workers.run(1, pooled_layers, recompute, [0, 2, 5])[0]
    assert hooks == 2
    # The output embedding is observed after the chunk, a recomputed block in the backward pass.
    assert with_graph == ([0, 2, 5] if recompute is None else [0, 5, 2])
    assert always == ([0, 2, 5] if recompute is None else [0, 2, 5, 2])
