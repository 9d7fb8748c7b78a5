"""P@1, MRR, CSLS and cosines of given states, compared with a plain float64 implementation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.plain_retrieval import plain_metrics

from megatron_prealign.evaluation import retrieval_metrics
from megatron_prealign.evaluation.retrieval_metrics import METRICS, WordLinks, measure_words

CPU = torch.device("cpu")
# Tolerances: means of float32 cosines against float64; P@1 and MRR come from counts and differ only by float64
# rounding.
COSINE, COUNT = 1e-6, 1e-12


def measured(source: torch.Tensor, target: torch.Tensor, links: Any) -> list[dict[str, float]]:
    """Metrics by name, from source to target and from target to source."""
    links = np.array(sorted(links), dtype=np.int64)
    values = measure_words(source, target, WordLinks(links, CPU))
    assert values.dtype == torch.float64
    return [dict(zip(METRICS, way, strict=True)) for way in values.tolist()]


def noisy_pairs(sources: int, targets: int, hidden: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Translations that are close to each other, some words with two of them, and a few hubs close to everything."""
    generator = torch.Generator().manual_seed(seed)
    meaning = torch.randn(max(sources, targets), hidden, generator=generator) + 0.5
    source = meaning[:sources] + 0.9 * torch.randn(sources, hidden, generator=generator)
    target = meaning[:targets] + 0.9 * torch.randn(targets, hidden, generator=generator)
    target[::7] = 0.5 * target[::7] + 1.0
    links = {(number % sources, number % targets) for number in range(max(sources, targets))}
    links |= {(0, 1), (3, 2)}
    return source, target, sorted(links)


def assert_same(got: dict[str, float], expected: dict[str, float]) -> None:
    for name, value in expected.items():
        tolerance = COSINE if "cosine" in name else COUNT
        assert got[name] == pytest.approx(value, abs=tolerance, nan_ok=True), name


@pytest.mark.parametrize("block", [1024, 16, 5, 1])
@pytest.mark.parametrize(("sources", "targets"), [(40, 40), (23, 41), (41, 17), (6, 6)])
def test_all_metrics_match_the_plain_version(
    monkeypatch: pytest.MonkeyPatch, sources: int, targets: int, block: int
) -> None:
    monkeypatch.setattr(retrieval_metrics, "_BLOCK_ROWS", block)
    source, target, links = noisy_pairs(sources, targets, 12, seed=sources)
    expected = plain_metrics(list(source), list(target), links)
    # Metrics must not be trivial, or both versions could agree by being constant.
    if min(sources, targets) > 10:
        assert all(0 < way[name] < 1 for way in expected for name in METRICS[:4])
        assert any(abs(way["mrr"] - way["mrr_csls"]) > 0.01 for way in expected)
    for got, by_hand in zip(measured(source, target, links), expected, strict=True):
        assert_same(got, by_hand)


def test_perfect_alignment_is_found_in_both_directions() -> None:
    states = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    for way in measured(states, 3 * states, [(number, number) for number in range(50)]):
        assert all(way[name] == 1.0 for name in METRICS[:4])
        assert way["positive_cosine"] == pytest.approx(1.0, abs=COSINE)


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_collapsed_model_scores_zero(noise: float) -> None:
    generator = torch.Generator().manual_seed(2)
    # Rounding may distinguish such words, the metrics must not.
    source, target = (torch.ones(1100, 48) + noise * torch.randn(1100, 48, generator=generator) for _ in range(2))
    for way in measured(source, target, [(number, number) for number in range(1100)]):
        assert way["p_at_1"] == way["p_at_1_csls"] == 0.0
        assert way["mrr"] == way["mrr_csls"] == pytest.approx(1 / 1100, rel=COUNT)
        assert way["positive_cosine"] == pytest.approx(1.0, abs=COSINE)
        assert way["negative_cosine"] == pytest.approx(1.0, abs=COSINE)


def test_a_tie_with_a_wrong_word_counts_as_wrong() -> None:
    source = torch.eye(3)
    # The translation of word 0 has the same state as another word; those of words 1 and 2 have distinct states.
    target = torch.stack([source[0], source[1], source[2], source[0]])
    forward, reverse = measured(source, target, [(0, 0), (1, 1), (1, 3), (2, 2)])
    assert forward["p_at_1"] == pytest.approx(2 / 3, abs=COUNT)
    assert forward["mrr"] == pytest.approx((1 / 2 + 1 + 1) / 3, abs=COUNT)
    # In reverse, the translation of target 3 is not near it: word 0 is first, word 2 ties with word 1.
    assert reverse["p_at_1"] == pytest.approx(3 / 4, abs=COUNT)
    assert reverse["mrr"] == pytest.approx((1 + 1 + 1 + 1 / 3) / 4, abs=COUNT)


def test_any_of_several_translations_is_correct() -> None:
    source = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    target = torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]])
    for way in measured(source, target, [(0, 0), (0, 1), (1, 2)]):
        assert way["p_at_1"] == way["mrr"] == 1.0


def test_nan_states_are_never_found() -> None:
    states = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    links = [(number, number) for number in range(20)]
    for way in measured(states * math.nan, states, links):
        assert way["p_at_1"] == way["p_at_1_csls"] == 0.0
        assert math.isnan(way["positive_cosine"])
    infinite = states.clone()
    infinite[4, 2] = math.inf
    forward, _ = measured(states, infinite, links)
    # The infinite state has cosine NaN to every word, which ranks ahead of every translation.
    assert forward["p_at_1"] == 0.0


def test_zero_states_are_far_from_all() -> None:
    states = torch.randn(12, 8, generator=torch.Generator().manual_seed(4))
    target = states.clone()
    target[3] = 0.0
    forward, reverse = measured(states, target, [(number, number) for number in range(12)])
    assert forward["p_at_1"] <= 11 / 12 + COUNT
    assert reverse["p_at_1"] == pytest.approx(11 / 12, abs=COUNT)
    assert math.isfinite(forward["positive_cosine"])


def test_a_single_pair_has_no_negative_cosine() -> None:
    (forward, reverse) = measured(torch.ones(1, 4), torch.ones(1, 4), [(0, 0)])
    assert forward["p_at_1"] == reverse["p_at_1"] == 1.0
    assert math.isnan(forward["negative_cosine"])


def test_no_tensor_is_larger_than_a_block_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    words, hidden, block = 600, 8, 32
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for each in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(each, torch.Tensor):
                    largest = max(largest, each.numel())
            return result

    monkeypatch.setattr(retrieval_metrics, "_BLOCK_ROWS", block)
    states = torch.randn(words, hidden, generator=torch.Generator().manual_seed(5))
    with Sizes():
        measured(states, states, [(number, number) for number in range(words)])
    assert 0 < largest <= words * block
