"""The similarity penalty against plain loops in float64, on one rank and on several."""

import pytest
import torch
from support.plain_losses import contrastive_loops
from support.workers import WorkerPool

# fp32 sums over about ten words in another order, against float64.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}

GROUPS = {
    "pairs": [0, 0, 1, 1, 2, 2, 3, 3],
    "three_languages": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "empty_slots": [0, 0, -1, 1, -1, 1, 2, 2, -1, 3, 3, -1],
    "words_without_positive": [0, -1, 1, 1, 2, -1, 3, 3],
    "a_rank_without_words": [0, 0, 1, 1, -1, -1, -1, -1],
    "positives_on_another_rank": [0, 1, 2, 3, 0, 1, 2, 3],
    "two_words": [-1, -1, -1, 4, -1, 4, -1, -1],
}


def words_for(groups: list[int], seed: int = 0) -> torch.Tensor:
    """Random states close to each other, so that the penalty is above 0; the values of empty slots must not matter."""
    return torch.randn((len(groups), 6), generator=torch.Generator().manual_seed(seed)) + 1.0


def penalties(words: torch.Tensor, groups: list[int]) -> tuple[float, torch.Tensor]:
    """Runs in workers: the penalty of all words and the gradient for this rank's words."""
    import torch.distributed as dist

    from megatron_prealign.alignment.similarity_penalty import similarity_penalty
    from megatron_prealign.kernels import word_groups
    from megatron_prealign.runtime import cpu

    cpu.enable()
    own = words.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    penalty = similarity_penalty(own, word_groups(torch.tensor(groups)), dist.group.WORLD)
    assert penalty.shape == ()
    assert penalty.dtype is torch.float32
    return penalty.item(), torch.autograd.grad(penalty, own)[0]


def loops(words: torch.Tensor, groups: list[int]) -> tuple[float, torch.Tensor]:
    """Penalty and gradient by plain loops."""
    words = words.double().requires_grad_()
    penalty = contrastive_loops(words, groups, 0.1)[1]
    return penalty.item(), torch.autograd.grad(penalty, words)[0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("case", GROUPS)
def test_penalty_and_gradient_are_those_of_plain_loops(workers: WorkerPool, case: str, ranks: int) -> None:
    words = words_for(GROUPS[case], seed=ranks)
    value, gradient = loops(words, GROUPS[case])
    assert value > 0
    results = workers.run(ranks, penalties, words, GROUPS[case])
    # Every rank has the full penalty, and the gradient for its own words.
    assert [penalty for penalty, _ in results] == pytest.approx([value] * ranks, rel=1e-5)
    torch.testing.assert_close(torch.cat([own for _, own in results]).double(), gradient, **TOLERANCE)


def test_states_in_bfloat16_are_normalised_in_fp32(workers: WorkerPool) -> None:
    words = words_for(GROUPS["pairs"]).bfloat16()
    value, gradient = loops(words, GROUPS["pairs"])
    penalty, got = workers.run(1, penalties, words, GROUPS["pairs"])[0]
    # A norm in bfloat16 would have an error of up to 2^-9.
    assert penalty == pytest.approx(value, rel=1e-5)
    # The gradient itself is rounded to bfloat16.
    torch.testing.assert_close(got.double(), gradient, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_empty_slots_change_nothing(workers: WorkerPool, ranks: int) -> None:
    groups = GROUPS["empty_slots"]
    words = words_for(groups)
    filled = [index for index, group in enumerate(groups) if group >= 0]
    alone, alone_gradient = workers.run(1, penalties, words[filled], [groups[index] for index in filled])[0]
    empty = [index for index, group in enumerate(groups) if group < 0]
    seen = []
    for content in (words[empty], torch.zeros(len(empty), 6), torch.full((len(empty), 6), 1e30)):
        words[empty] = content
        results = workers.run(ranks, penalties, words, groups)
        gradient = torch.cat([own for _, own in results])
        # The same sums over the same words, with zeros in between.
        assert results[0][0] == pytest.approx(alone, rel=1e-6)
        torch.testing.assert_close(gradient[filled], alone_gradient, rtol=1e-5, atol=1e-7)
        assert torch.count_nonzero(gradient[empty]) == 0
        seen.append((results[0][0], gradient))
    assert all(penalty == seen[0][0] and torch.equal(gradient, seen[0][1]) for penalty, gradient in seen)


@pytest.mark.parametrize("groups", [[0, -1, -1, -1], [-1, -1, -1, -1]])
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_a_pair_of_words_the_penalty_is_0(workers: WorkerPool, groups: list[int], ranks: int) -> None:
    for penalty, gradient in workers.run(ranks, penalties, words_for(groups), groups):
        # The squared norm of a unit vector, minus one.
        assert penalty == pytest.approx(0.0, abs=1e-6)
        # Only rounding errors remain.
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("ranks", [1, 2])
def test_words_of_length_0_have_similarity_0(workers: WorkerPool, ranks: int) -> None:
    groups = [0, 0, 1, 1]
    words = words_for(groups)
    words[1] = 0.0
    results = workers.run(ranks, penalties, words, groups)
    gradient = torch.cat([own for _, own in results])
    others = [0, 2, 3]
    unit = words[others].double() / words[others].double().norm(dim=1, keepdim=True)
    # Cosine 0 to each of the three others; the plain loops would divide by 0.
    mean = ((unit @ unit.t()).sum() - 3) / 12
    assert mean > 0
    assert results[0][0] == pytest.approx(mean.item(), rel=1e-5)
    assert torch.isfinite(gradient).all()
    assert torch.count_nonzero(gradient[1]) == 0


def test_penalty_is_0_for_a_negative_mean(workers: WorkerPool) -> None:
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    penalty, gradient = workers.run(1, penalties, opposite, [0, 0, 1, 1])[0]
    assert penalty == 0.0
    assert torch.count_nonzero(gradient) == 0
    same, _ = workers.run(1, penalties, torch.ones(4, 2), [0, 0, 1, 1])[0]
    # All similarities are 1, up to rounding of the norms.
    assert same == pytest.approx(1.0, abs=1e-6)
