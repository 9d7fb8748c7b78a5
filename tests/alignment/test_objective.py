"""The contrastive objective against two plain loops in float64, alone and over data-parallel ranks."""

import math
from typing import Any

import pytest
import torch
from plain_losses import contrastive_loops
from workers import WorkerPool

TAU = 0.1
# fp32 against float64 through exp(s / 0.1).
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}

GROUPS = {
    "pairs": [0, 0, 1, 1, 2, 2, 3, 3],
    "three_languages": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "empty_slots": [0, 0, -1, 1, -1, 1, 2, 2, -1, 3, 3, -1],
    "words_without_positive": [0, -1, 1, 1, 2, -1, 3, 3],
    "uneven_groups": [0, 0, 0, 1, 1, -1, 2, -1, -1, 3, 3, 3],
    "positives_on_another_rank": [0, 1, 2, 3, 0, 1, 2, 3],
}


def words_for(groups: list[int], seed: int = 0) -> torch.Tensor:
    """Random states, near one another, so that the penalty is above 0; what empty slots hold must not matter."""
    return torch.randn((len(groups), 6), generator=torch.Generator().manual_seed(seed)) + 0.5


def losses(words: torch.Tensor, groups: list[int], with_penalty: bool) -> dict[str, Any]:
    """Runs in workers: this rank's parts and the gradient of each with respect to its own words."""
    import torch.distributed as dist

    from megatron_prealign.alignment.objective import WordGroups, contrastive_loss
    from megatron_prealign.runtime import cpu

    cpu.enable()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    every = torch.tensor(groups)
    sizes = torch.bincount(every[every >= 0]) if (every >= 0).any() else torch.zeros(1)
    own = words.chunk(ranks)[rank].clone().requires_grad_()
    loss, penalty = contrastive_loss(
        own,
        WordGroups(every=every, own=every.chunk(ranks)[rank], pairs=(sizes * (sizes - 1)).sum().float()),
        temperature=TAU,
        group=dist.group.WORLD,
        with_penalty=with_penalty,
    )
    answers: dict[str, Any] = {"loss": loss.item(), "gradient": torch.autograd.grad(loss, own, retain_graph=True)[0]}
    if penalty is not None:
        answers["penalty"] = penalty.item()
        answers["penalty_gradient"] = torch.autograd.grad(penalty, own)[0]
    return answers


def loops(words: torch.Tensor, groups: list[int]) -> dict[str, Any]:
    """Loss, penalty and their gradients by plain loops."""
    words = words.double().requires_grad_()
    loss, penalty, _ = contrastive_loops(words, groups, TAU)
    return {
        "loss": loss.item(),
        "gradient": torch.autograd.grad(loss, words, retain_graph=True)[0],
        "penalty": penalty.item(),
        "penalty_gradient": torch.autograd.grad(penalty, words)[0],
    }


def assert_equal_to_loops(parts: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for name in ("loss", "penalty"):
        assert sum(part[name] for part in parts) == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    for name in ("gradient", "penalty_gradient"):
        got = torch.cat([part[name] for part in parts]).double()
        torch.testing.assert_close(got, expected[name], **TOLERANCE)


@pytest.mark.parametrize("case", GROUPS)
def test_loss_and_gradient_are_those_of_plain_loops(workers: WorkerPool, case: str) -> None:
    words = words_for(GROUPS[case])
    expected = loops(words, GROUPS[case])
    assert expected["loss"] > 0
    assert expected["penalty"] > 0
    assert_equal_to_loops(workers.run(1, losses, words, GROUPS[case], True), expected)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", GROUPS)
def test_data_parallel_parts_sum_to_the_one_process_loss(workers: WorkerPool, case: str, ranks: int) -> None:
    words = words_for(GROUPS[case], seed=1)
    assert_equal_to_loops(workers.run(ranks, losses, words, GROUPS[case], True), loops(words, GROUPS[case]))


def test_empty_slots_change_nothing(workers: WorkerPool) -> None:
    groups = GROUPS["empty_slots"]
    words = words_for(groups)
    first = workers.run(1, losses, words, groups, True)[0]
    filled = [index for index, group in enumerate(groups) if group >= 0]
    alone = workers.run(1, losses, words[filled], [groups[index] for index in filled], True)[0]
    # The same sums over the same words, with zeros in between.
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert first["penalty"] == pytest.approx(alone["penalty"], rel=1e-6)
    empty = [index for index, group in enumerate(groups) if group < 0]
    assert torch.count_nonzero(first["gradient"][empty]) == 0
    assert torch.count_nonzero(first["penalty_gradient"][empty]) == 0
    # Zeros are what the pooling leaves in an empty slot.
    words[empty] = 0.0
    zeros = workers.run(1, losses, words, groups, True)[0]
    assert zeros["loss"] == first["loss"]
    assert all(torch.isfinite(zeros[name]).all() for name in ("gradient", "penalty_gradient"))


@pytest.mark.parametrize("groups", [[0, 1, 2, 3], [0, -1, -1, 1], [0, -1, -1, -1], [-1, -1, -1, -1]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_positives_the_loss_is_0_and_gradients_are_finite(
    workers: WorkerPool, groups: list[int], ranks: int
) -> None:
    for part in workers.run(ranks, losses, words_for(groups), groups, True):
        assert part["loss"] == 0.0
        assert torch.count_nonzero(part["gradient"]) == 0
        assert torch.isfinite(part["penalty_gradient"]).all()
        assert math.isfinite(part["penalty"])


def test_equal_words_reach_the_floor(workers: WorkerPool) -> None:
    """Orthogonal groups of two equal words: only the 126 other words are in the denominator, each with exp(0). With the
    word itself in it the loss could not fall below log 2."""
    groups = [index // 2 for index in range(128)]
    words = torch.eye(64).repeat_interleave(2, dim=0)
    loss = workers.run(1, losses, words, groups, False)[0]["loss"]
    assert loss == pytest.approx(math.log1p(126 * math.exp(-1 / TAU)), rel=1e-3)
    assert loss < 0.0085


def test_penalty_is_of_a_positive_mean_only(workers: WorkerPool) -> None:
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    answer = workers.run(1, losses, opposite, [0, 0, 1, 1], True)[0]
    assert answer["penalty"] == 0.0
    assert torch.count_nonzero(answer["penalty_gradient"]) == 0
    same = workers.run(1, losses, torch.ones(4, 2), [0, 0, 1, 1], True)[0]
    # All similarities are 1, up to rounding of the norms.
    assert same["penalty"] == pytest.approx(1.0, abs=1e-6)
    assert "penalty" not in workers.run(1, losses, torch.ones(4, 2), [0, 0, 1, 1], False)[0]
