"""Words in rows: their positions, their attention mask, and equal states of packed and unpacked words."""

from typing import Any

import numpy as np
import pytest
import torch
from support.model_builds import build, perturb, recipe_values
from support.workers import WorkerPool

ROW = 64
LAYERS = 4

# Tokens of each word, 0 for an empty slot.
LENGTHS: dict[str, list[int]] = {
    "one_word": [3],
    "some": [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4],
    "equal_words_that_do_not_divide_a_row": [7] * 30,
    "rows_filled_to_the_end": [8] * 24,
    "as_long_as_a_row": [ROW, ROW, 1, ROW, 2],
    "longer_than_a_row": [3, 70, 1, 69, 70, 70],
    "empty_at_the_start": [0, 0, 5, 2],
    "empty_at_the_end": [5, 2, 0, 0, 0],
    "empty_between": [5, 0, 2, 0, 0, 7],
    "empty_after_a_full_row": [32, 32, 0, 0, 32, 32, 0],
    "all_empty": [0, 0, 0, 0],
    "no_words": [],
    "random": np.random.default_rng(1).integers(0, 9, 300).tolist(),
    "random_long": np.random.default_rng(2).integers(0, 65, 60).tolist(),
}


def tokens_of(lengths: list[int]) -> list[list[int]]:
    """Words whose tokens are all different, so that each identifies its position."""
    ends = np.cumsum([0, *lengths])
    return [list(range(1 + start, 1 + end)) for start, end in zip(ends, ends[1:], strict=False)]


def laid_out(lengths: list[int], packed: bool, multiple: int) -> dict[str, torch.Tensor]:
    """Runs in a worker: a batch as plain tensors."""
    from megatron_prealign.alignment.packing import PACKED_ROW_TOKENS, lay_out_words

    assert PACKED_ROW_TOKENS == ROW
    # Values after a word's end must not matter.
    tokens = np.full((len(lengths), max([1, *lengths])), 999, dtype=np.int64)
    for row, word in zip(tokens, tokens_of(lengths), strict=True):
        row[: len(word)] = word
    batch = lay_out_words(
        tokens,
        np.array(lengths, dtype=np.int64),
        packed=packed,
        multiple=multiple,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    names = ("tokens", "position_ids", "attention_mask", "word_tokens", "token_indices", "weights")
    return {name: getattr(batch, name) for name in names}


def word_positions(batch: dict[str, torch.Tensor], lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Row and column of each token of each word, found by token id."""
    where = {int(batch["tokens"][row, column]): (int(row), int(column)) for row, column in batch["tokens"].nonzero()}
    assert len(where) == int(batch["tokens"].count_nonzero()) == sum(lengths)
    return [[where[token] for token in word] for word in tokens_of(lengths)]


@pytest.mark.slow
@pytest.mark.parametrize("multiple", [1, 2, 3, 8])
@pytest.mark.parametrize("case", LENGTHS)
def test_words_are_complete_and_in_order(workers: WorkerPool, case: str, multiple: int) -> None:
    lengths = LENGTHS[case]
    batch = workers.run(1, laid_out, lengths, True, multiple)[0]
    rows, width = batch["tokens"].shape
    longest = max([ROW, *lengths])
    assert width % multiple == 0
    assert longest <= width < longest + multiple
    # Each directly after the previous one, in the same row while it fits.
    row = column = 0
    for word, positions in zip(tokens_of(lengths), word_positions(batch, lengths), strict=True):
        if column + len(word) > width:
            row, column = row + 1, 0
        assert positions == [(row, column + index) for index in range(len(word))]
        assert [int(batch["position_ids"][position]) for position in positions] == list(range(len(word)))
        column += len(word)
    assert rows == row + 1
    assert not batch["position_ids"][batch["tokens"] == 0].any()


@pytest.mark.parametrize("case", LENGTHS)
def test_a_token_attends_to_its_own_word_up_to_itself(workers: WorkerPool, case: str) -> None:
    lengths = LENGTHS[case]
    batch = workers.run(1, laid_out, lengths, True, 1)[0]
    rows, width = batch["tokens"].shape
    # A position without a word attends to itself, or softmax would be NaN.
    expected = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1)
    for positions in word_positions(batch, lengths):
        for index, (row, column) in enumerate(positions):
            for earlier in positions[: index + 1]:
                expected[row, column, earlier[1]] = True
    mask = batch["attention_mask"]
    assert mask.shape == (rows, 1, width, width)
    assert mask.dtype is torch.float32
    assert torch.equal(mask[:, 0] == 0.0, expected)
    assert torch.equal(mask[:, 0] == -torch.inf, ~expected)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("case", LENGTHS)
def test_indices_and_weights_give_means(workers: WorkerPool, case: str, packed: bool) -> None:
    lengths = LENGTHS[case]
    batch = workers.run(1, laid_out, lengths, packed, 2)[0]
    rows, width = batch["tokens"].shape
    indices, weights = batch["token_indices"], batch["weights"]
    assert indices.shape == weights.shape == batch["word_tokens"].shape == (len(lengths), max([1, *lengths]))
    assert indices.dtype is torch.int64
    assert weights.dtype is torch.float32
    # All indices are valid, also those with weight 0.
    assert not len(lengths) or 0 <= int(indices.min()) <= int(indices.max()) < rows * width
    # As in the model: tokens first.
    hidden = torch.randn(width, rows, 5, generator=torch.Generator().manual_seed(1))
    means = (hidden.flatten(0, 1)[indices] * weights[..., None]).sum(1)
    for slot, where in enumerate(word_positions(batch, lengths)):
        mean = torch.stack([hidden[column, row] for row, column in where]).mean(0) if where else torch.zeros(5)
        # A weighted sum against a mean: rounding.
        torch.testing.assert_close(means[slot], mean, rtol=1e-5, atol=1e-6)
        length = len(where)
        assert weights[slot, :length].tolist() == [float(np.float32(1 / max(length, 1)))] * length
        assert not weights[slot, length:].any()
        # After the end of a word the index of its first token, not one common to all words.
        assert set(indices[slot, length:].tolist()) <= {int(indices[slot, 0])}
    for word, kept in zip(tokens_of(lengths), batch["word_tokens"].tolist(), strict=True):
        assert kept == word + [0] * (len(kept) - len(word))


@pytest.mark.parametrize(("multiple", "width"), [(1, 9), (2, 10), (4, 12)])
def test_unpacked_words_have_a_row_each(workers: WorkerPool, multiple: int, width: int) -> None:
    lengths = [*LENGTHS["some"], 0]
    batch = workers.run(1, laid_out, lengths, False, multiple)[0]
    assert batch["tokens"].tolist() == [word + [0] * (width - len(word)) for word in tokens_of(lengths)]
    assert batch["position_ids"].tolist() == [[*range(length)] + [0] * (width - length) for length in lengths]
    # Two dimensions leave attention causal: there is nothing before a word.
    assert batch["attention_mask"].dim() == 2
    assert batch["attention_mask"].numel() > 0


def states(values: dict[str, Any], lengths: list[int]) -> list[dict[int, torch.Tensor]]:
    """Runs in a worker: the words' states at every layer, packed and not packed."""
    from megatron_prealign.alignment.packing import lay_out_words
    from megatron_prealign.alignment.taps import LayerTaps

    recipe, runtime, (chunk,) = build(values)
    perturb(chunk)
    taps = LayerTaps([chunk], runtime, LAYERS)
    tokens = np.random.default_rng(3).integers(1, 40, (len(lengths), max(lengths)))
    results: list[dict[int, torch.Tensor]] = []
    for packed in (True, False):
        batch = lay_out_words(
            tokens,
            np.array(lengths),
            packed=packed,
            multiple=1,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        seen: dict[int, torch.Tensor] = {}
        with torch.no_grad(), taps.observing(lambda layer, words, _, seen=seen: seen.update({layer: words.clone()})):
            taps.run_words(chunk, chunk, batch)
        results.append(seen)
    return results


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_words_have_the_states_of_unpacked_words(workers: WorkerPool, family: str) -> None:
    """Llama's rotary angles depend on the column, but only differences matter; GPT-2 has learned positions."""
    lengths = [3, 1, 0, 8, 12, 5, 7, 12, 11, 0, 2, 9, 12, 12, 6, 4, 1, 12, 10]
    assert sum(lengths) > ROW
    packed, alone = workers.run(1, states, recipe_values(family), lengths)[0]
    assert sorted(packed) == sorted(alone) == list(range(LAYERS + 2))
    for layer, words in alone.items():
        assert words.shape == (len(lengths), 32)
        # Other rotary angles and other kernels: fp32 rounding over four blocks.
        torch.testing.assert_close(packed[layer], words, rtol=1e-4, atol=1e-5)
