"""The contrastive loss against its eager definition in float64, and what must hold for any words."""

import pytest
import torch
from torch import Tensor

from megatron_prealign.kernels import WordGroups, contrastive_loss, contrastive_loss_reference, word_groups

SEED = 11
TEMPERATURE = 0.1


def make_words(words: int, hidden: int, layers: int = 1, seed: int = SEED) -> Tensor:
    """Words of different lengths that all share a direction, as hidden states do; [layers, words, hidden] float64 that
    float32 holds exactly."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn((layers, words, hidden), generator=random) + 0.5
    return (drawn * torch.rand((layers, words, 1), generator=random).add(0.1)).double()


def make_group(words: int, meanings: int, empty: float = 0.2, seed: int = SEED) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    group = torch.randint(meanings, (words,), generator=random)
    return torch.where(torch.rand(words, generator=random) < empty, -1, group)


def loss_and_gradient(function: object, words: Tensor, groups: WordGroups, **options: object) -> tuple[Tensor, Tensor]:
    words = words.detach().requires_grad_()
    loss = function(words, groups, **{"temperature": TEMPERATURE, **options})
    loss.sum().backward()
    return loss.detach(), words.grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_groups_are_counted() -> None:
    groups = word_groups(torch.tensor([2, -1, 0, 2, 2, -1, 1, 1]))
    assert groups.positives.tolist() == [2, 0, 0, 2, 2, 0, 1, 1]
    assert groups.pairs.item() == 8 and groups.pairs.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("words", "hidden", "layers"), [(5, 3, 1), (97, 40, 3), (300, 65, 2)])
def test_equals_the_definition(dtype: torch.dtype, words: int, hidden: int, layers: int) -> None:
    given = make_words(words, hidden, layers).to(dtype)
    groups = word_groups(make_group(words, max(2, words // 3)))
    loss, gradient = loss_and_gradient(contrastive_loss, given, groups)
    expected, wanted = loss_and_gradient(contrastive_loss_reference, given.double(), groups)
    # the bounds; float64 to see that only rounding stands between
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3}[dtype]
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    assert relative(loss, expected) < min(bound, 1e-5)
    assert relative(gradient, wanted) < bound
