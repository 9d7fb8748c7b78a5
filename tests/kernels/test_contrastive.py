"""The contrastive loss against its eager definition in float64, and properties for any words.

On a GPU and under TRITON_INTERPRET=1 (a separate process in `make test`) the Triton kernels are tested, else the chunks
in plain torch. float64 words are always computed in chunks in plain torch.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.marks import fewer_interpreted, slow_interpreted
from support.messages import user_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_prealign.kernels import (
    WordGroups,
    contrastive_chunked,
    contrastive_launch,
    contrastive_loss,
    contrastive_loss_reference,
    word_groups,
)

SEED = 11
TEMPERATURE = 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The bounds on relative norms; float64 shows that the differences are rounding only. Rounding only the gradient
# to bfloat16 gives 1.7e-3. The loss of bfloat16 words is computed in float32 from the unchanged words.
GRADIENT_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-3}
LOSS_BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
Loss = Callable[..., Tensor]


def make_words(words: int, hidden: int, layers: int = 1, seed: int = SEED) -> Tensor:
    """[layers, words, hidden] float64, exactly representable in float32: words of different lengths with a common
    direction, like hidden states."""
    random = torch.Generator().manual_seed(seed)
    drawn = torch.randn((layers, words, hidden), generator=random) + 0.5
    return (drawn * torch.rand((layers, words, 1), generator=random).add(0.1)).double().to(DEVICE)


def make_group(words: int, meanings: int, empty: float = 0.2, seed: int = SEED) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    group = torch.randint(meanings, (words,), generator=random)
    return torch.where(torch.rand(words, generator=random) < empty, -1, group).to(DEVICE)


def loss_and_gradient(
    function: Loss, words: Tensor, groups: WordGroups, weights: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss of each layer, and the gradient of their sum, optionally weighted."""
    words = words.detach().clone().requires_grad_()
    loss = function(words, groups, **{"temperature": TEMPERATURE, **options})
    (loss if weights is None else loss * weights.to(loss.dtype)).sum().backward()
    assert words.grad is not None
    return loss.detach(), words.grad


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_equals_definition(words: Tensor, groups: WordGroups, *, condition: float = 1.0, **options: Any) -> None:
    """`condition` is the factor by which the error of a float32 gradient may exceed the usual bound."""
    loss, gradient = loss_and_gradient(contrastive_loss, words, groups, **options)
    expected, expected_gradient = loss_and_gradient(contrastive_loss_reference, words.double(), groups, **options)
    assert loss.shape == expected.shape and gradient.dtype == words.dtype
    assert loss.dtype == (torch.float64 if words.dtype == torch.float64 else torch.float32)
    assert relative(loss, expected) < LOSS_BOUND[words.dtype]
    factor = 1.0 if words.dtype == torch.bfloat16 else condition
    assert relative(gradient, expected_gradient) < factor * GRADIENT_BOUND[words.dtype]


def test_groups_are_counted() -> None:
    groups = word_groups(torch.tensor([2, -1, 0, 2, 2, -1, 1, 1], device=DEVICE))
    assert groups.positives.tolist() == [2, 0, 0, 2, 2, 0, 1, 1]
    assert groups.pairs.item() == 8 and groups.pairs.dtype == torch.float32


def test_definition_by_hand() -> None:
    """The formula with loops and math.exp, on words of which one is empty, one is alone and three are in one group."""
    words, group = make_words(7, 5)[0].cpu(), [0, 3, 0, -1, 5, 3, 0]
    rows = [[float(value) for value in row] for row in words]

    def cosine(i: int, j: int) -> float:
        length = math.sqrt(sum(a * a for a in rows[i])) * math.sqrt(sum(b * b for b in rows[j]))
        return sum(a * b for a, b in zip(rows[i], rows[j], strict=True)) / length

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j and group[i] >= 0 and group[i] == group[j]]
    total = 0.0
    for i, j in pairs:
        below = sum(math.exp(cosine(i, a) / TEMPERATURE) for a in range(7) if a != i and group[a] >= 0)
        total -= math.log(math.exp(cosine(i, j) / TEMPERATURE) / below)
    assert len(pairs) == 8
    groups = word_groups(torch.tensor(group))
    for function in (contrastive_loss, contrastive_loss_reference):
        # float64: only the order of the sums differs
        assert function(words, groups, temperature=TEMPERATURE).item() == pytest.approx(total / 8, rel=1e-12)


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
@pytest.mark.parametrize(("noise", "shared"), [(0.1, 0.0), (0.01, 0.0), (0.3, 5.0), (0.3, 20.0)])
def test_equals_the_definition_for_trained_words(dtype: torch.dtype, noise: float, shared: float) -> None:
    """Translations close together, and words that nearly all point in one direction: their common component cancels in
    the gradient, and its rounding error must cancel too."""
    random = torch.Generator().manual_seed(SEED)
    meanings = torch.randn((64, 128), generator=random).repeat_interleave(2, dim=0)
    drawn = meanings + noise * torch.randn((128, 128), generator=random) + shared * torch.randn(128, generator=random)
    words = drawn.to(torch.bfloat16).to(dtype).to(DEVICE)
    # Near the minimum of the loss the gradient is the small difference of a probability and 1. Measured error: 1.6e-5.
    assert_equals_definition(words, word_groups(torch.arange(128, device=DEVICE) // 2), condition=4.0)


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
@pytest.mark.parametrize(
    ("words", "hidden", "layers", "meanings"),
    [(5, 3, 1, 2), (97, 40, 3, 30), (128, 64, 1, 64), (200, 65, 2, 50), (257, 128, 1, 3), (60, 300, 5, 20)],
)
def test_equals_the_definition(dtype: torch.dtype, words: int, hidden: int, layers: int, meanings: int) -> None:
    inputs = make_words(words, hidden, layers).to(dtype)
    weights = torch.arange(1.0, layers + 1, device=DEVICE)
    assert_equals_definition(inputs, word_groups(make_group(words, meanings)), weights=weights)


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
def test_words_without_layers(dtype: torch.dtype) -> None:
    assert_equals_definition(make_words(90, 48)[0].to(dtype), word_groups(make_group(90, 30)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_temperature(dtype: torch.dtype, temperature: float) -> None:
    assert_equals_definition(make_words(150, 64).to(dtype), word_groups(make_group(150, 50)), temperature=temperature)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_group_of_all_and_groups_of_many(dtype: torch.dtype) -> None:
    words = make_words(140, 64).to(dtype)
    assert_equals_definition(words, word_groups(make_group(140, 1, empty=0.0)))
    assert_equals_definition(words, word_groups(make_group(140, 4, empty=0.5)))


@pytest.mark.parametrize("temperature", [1e-3, 1e-2])
def test_cold_softmax_stays_finite(temperature: float) -> None:
    """Logits up to a thousand, whose exponentials overflow float32."""
    groups = word_groups(make_group(80, 20))
    words = make_words(80, 32)
    loss, gradient = loss_and_gradient(contrastive_loss, words.float(), groups, temperature=temperature)
    expected, wanted = loss_and_gradient(contrastive_loss_reference, words, groups, temperature=temperature)
    # an error of 2e-7 in a cosine is 2e-7 / temperature in the logit, which is the relative error of p
    assert relative(loss, expected) < 2e-7 / temperature
    assert relative(gradient, wanted) < 2e-7 / temperature


def test_small_losses_are_accurate() -> None:
    """Aligned words: the log-sum-exp and the logit of the pair are both ten, their difference is 1e-3."""
    hidden, pairs = 64, 40
    base = torch.linalg.qr(make_words(hidden, hidden)[0]).Q[:pairs]
    words = torch.cat([base, base + 1e-3 * make_words(pairs, hidden)[0]]).float()
    groups = word_groups(torch.arange(2 * pairs, device=DEVICE) % pairs)
    loss, _ = loss_and_gradient(contrastive_loss, words, groups)
    expected, _ = loss_and_gradient(contrastive_loss_reference, words.double(), groups)
    assert expected < 5e-3
    # half a digit of float32 around ten, 5e-7, would be 1e-4 of this loss
    assert relative(loss, expected) < 2e-5


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
def test_layers_at_once_equal_one_by_one(dtype: torch.dtype) -> None:
    words, groups = make_words(150, 40, layers=3).to(dtype), word_groups(make_group(150, 50))
    loss, gradient = loss_and_gradient(contrastive_loss, words, groups)
    for layer in range(3):
        alone, wanted = loss_and_gradient(contrastive_loss, words[layer], groups)
        # tiles and chunks, and so the order of sums, may depend on the number of layers
        assert relative(loss[layer], alone) < 1e-6
        assert relative(gradient[layer], wanted) < (1e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
def test_empty_slots_do_not_change_the_result(dtype: torch.dtype) -> None:
    group = make_group(160, 40, empty=0.4)
    words = make_words(160, 40).to(dtype)
    words[:, group < 0] *= 1e3
    loss, gradient = loss_and_gradient(contrastive_loss, words, word_groups(group))
    filled = group >= 0
    alone, wanted = loss_and_gradient(contrastive_loss, words[:, filled], word_groups(group[filled]))
    # tiles start at other words
    assert relative(loss, alone) < 1e-6
    assert relative(gradient[:, filled], wanted) < (1e-3 if dtype == torch.bfloat16 else 1e-6)
    assert torch.count_nonzero(gradient[:, ~filled]) == 0


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
def test_empty_slots_closer_than_any_word(dtype: torch.dtype) -> None:
    """All cosines are negative, so an empty slot, with cosine 0, would get a huge probability."""
    words = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [0.0, 0.0]], dtype=dtype, device=DEVICE)
    groups = word_groups(torch.tensor([0, 0, -1], device=DEVICE))
    loss, gradient = loss_and_gradient(contrastive_loss, words, groups, temperature=2e-3)
    # the only candidate of each is its positive
    assert loss == 0 and torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
@pytest.mark.parametrize("group", [[0, 1, 2], [-1, -1, -1], [-1, 0, -1], [0], [-1]])
def test_without_pairs_loss_and_gradient_are_zero(dtype: torch.dtype, group: list[int]) -> None:
    words = make_words(len(group), 6).to(dtype)
    loss, gradient = loss_and_gradient(contrastive_loss, words, word_groups(torch.tensor(group, device=DEVICE)))
    assert loss.tolist() == [0.0] and torch.count_nonzero(gradient) == 0


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
def test_words_of_norm_zero(dtype: torch.dtype) -> None:
    words, groups = make_words(70, 24).to(dtype), word_groups(make_group(70, 20, empty=0.1))
    words[:, ::7] = 0
    assert_equals_definition(words, groups)
    _, gradient = loss_and_gradient(contrastive_loss, words, groups)
    assert torch.count_nonzero(gradient[:, ::7]) == 0


def test_length_of_a_word_does_not_matter() -> None:
    words, groups = make_words(60, 32).float(), word_groups(make_group(60, 20))
    loss, gradient = loss_and_gradient(contrastive_loss, words, groups)
    # powers of two are exact
    longer, smaller = loss_and_gradient(contrastive_loss, words * 2.0**20, groups)
    assert torch.equal(loss, longer) and torch.equal(gradient, smaller * 2.0**20)


@pytest.mark.parametrize("dtype", GRADIENT_BOUND)
def test_runs_are_equal_bit_by_bit(dtype: torch.dtype) -> None:
    words, groups = make_words(150, 40).to(dtype), word_groups(make_group(150, 50))
    loss, gradient = loss_and_gradient(contrastive_loss, words, groups)
    again, same = loss_and_gradient(contrastive_loss, words, groups)
    assert torch.equal(loss, again) and torch.equal(gradient, same)


def test_strides_do_not_matter() -> None:
    words, groups = make_words(50, 24, layers=2).float(), word_groups(make_group(50, 20))
    loss, gradient = loss_and_gradient(contrastive_loss, words, groups)
    turned = words.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = contrastive_loss(turned, groups, temperature=TEMPERATURE)
    found.sum().backward()
    assert torch.equal(found, loss) and turned.grad is not None and torch.equal(turned.grad, gradient)


@slow_interpreted
@pytest.mark.parametrize("dtype", fewer_interpreted(GRADIENT_BOUND, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("large", [False, True])
def test_many_chunks_and_splits(dtype: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and chunks as in a large batch: several of each, the last one shorter."""
    monkeypatch.setattr(contrastive_chunked, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(contrastive_chunked, "_MIN_CHUNK_ROWS", 37)
    monkeypatch.setattr(contrastive_launch, "_MIN_SCRATCH_BYTES", 0)
    monkeypatch.setattr(contrastive_launch, "_MULTIPROCESSORS", 0 if large else 1 << 20)
    monkeypatch.setattr(contrastive_launch, "_WAVES", 0)
    monkeypatch.setattr(contrastive_launch, "_SPLITS", 2)
    words, groups = make_words(333, 70, layers=2).to(dtype), word_groups(make_group(333, 100))
    assert_equals_definition(words, groups)


class LargestOutput(TorchDispatchMode):
    """Records the size in bytes of the largest output of any operation."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(each, Tensor):
                self.largest = max(self.largest, each.nbytes)
        return result


@slow_interpreted
@pytest.mark.parametrize("dtype", fewer_interpreted(GRADIENT_BOUND, torch.bfloat16))
def test_nothing_is_larger_than_the_words(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_chunked, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(contrastive_launch, "_MIN_SCRATCH_BYTES", 0)
    total, hidden = 640, 384
    itemsize = 8 if dtype == torch.float64 else 4
    words, groups = make_words(total, hidden).to(dtype), word_groups(make_group(total, 200))
    with LargestOutput() as seen:
        loss_and_gradient(contrastive_loss, words, groups)
    # Three tensors of a chunk of 128 rows are as large as these words, which are computed in float32 or float64; the
    # kernels read bfloat16 directly. The similarities would be 1.7 times as large.
    assert 0 < seen.largest <= total * hidden * itemsize
    with LargestOutput() as seen:
        loss_and_gradient(contrastive_loss_reference, words, groups)
    assert seen.largest == total * total * itemsize


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"words": torch.zeros(6, 4, dtype=torch.float16)}, ("words", "torch.float16 [6, 4]", "[words, hidden] or")),
        ({"words": torch.zeros(6)}, ("words", "torch.float32 [6]", "[words, hidden]")),
        ({"words": torch.zeros(5, 4)}, ("groups.group", "torch.int64 [6]", "torch.int64 [5]", "5 words", "1 ranks")),
        ({"words": torch.zeros(6, 4, device="meta")}, ("groups.group is on cpu", "meta")),
        ({"temperature": 0.0}, ("temperature is 0.0", "above 0")),
        ({"temperature": math.nan}, ("temperature is nan",)),
        ({"temperature": math.inf}, ("temperature is inf",)),
        ({"words": torch.zeros(1, (1 << 21) + 1, 1, device="meta")}, ("words", 2097153, "all ranks", 1 << 21)),
    ],
)
def test_bad_calls_are_refused(change: dict[str, Any], facts: tuple[object, ...]) -> None:
    groups = word_groups(torch.tensor([0, 0, 1, 1, -1, 2]))
    call = {"words": torch.zeros(6, 4), "groups": groups, "temperature": 0.1, **change}
    for function in (contrastive_loss, contrastive_loss_reference):
        with user_error(*facts, kind=ValueError):
            function(**call)


@pytest.mark.parametrize("group", [torch.zeros(3), torch.zeros((3, 1), dtype=torch.int64)])
def test_bad_groups_are_refused(group: Tensor) -> None:
    with user_error("group", group.dtype, list(group.shape), "int64", kind=ValueError):
        word_groups(group)


def part_of_rank(
    dtype: torch.dtype, empty_fractions: list[float], layers: int, hidden: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run on every rank: its part of the loss and its gradient, and the definition's loss and gradient."""
    import torch.distributed as dist

    ranks, rank, per_rank = dist.get_world_size(), dist.get_rank(), 45
    words = make_words(per_rank * ranks, hidden, layers).to(dtype)
    # the number of empty slots differs between ranks, and the members of a group are on several ranks
    group = torch.cat([make_group(per_rank, 25, empty, seed) for seed, empty in enumerate(empty_fractions[:ranks])])
    groups, weights = word_groups(group), torch.arange(1.0, layers + 1, device=DEVICE)
    own = slice(per_rank * rank, per_rank * rank + per_rank)
    part, gradient = loss_and_gradient(contrastive_loss, words[:, own], groups, weights, process_group=dist.group.WORLD)
    total, wanted = loss_and_gradient(contrastive_loss_reference, words.double(), groups, weights)
    return part.cpu(), gradient.cpu(), total.cpu(), wanted[:, own].cpu()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="gloo gathers from the CPU; NCCL needs one GPU per rank")
@pytest.mark.parametrize(
    ("dtype", "empty_fractions", "layers", "hidden"),
    [
        (torch.float32, [0.1, 0.6], 2, 40),
        (torch.float64, [0.3, 1.0, 0.0], 1, 33),
        (torch.bfloat16, [0.0, 0.9, 0.2, 0.5], 3, 64),
        (torch.float32, [0.0, 0.9, 0.2, 0.5], 3, 64),
    ],
)
def test_parts_of_ranks(
    workers: "WorkerPool",  # noqa: F821
    dtype: torch.dtype,
    empty_fractions: list[float],
    layers: int,
    hidden: int,
) -> None:
    results = workers.run(len(empty_fractions), part_of_rank, dtype, empty_fractions, layers, hidden)
    total = results[0][2]
    assert relative(sum(part.double() for part, *_ in results), total) < LOSS_BOUND[dtype]
    for _, gradient, _, wanted in results:
        if wanted.norm() == 0:
            assert torch.count_nonzero(gradient) == 0
        else:
            assert relative(gradient, wanted) < GRADIENT_BOUND[dtype]
    assert sum(int(wanted.norm() > 0) for *_, wanted in results) == sum(empty < 1 for empty in empty_fractions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_many_words_on_a_gpu(dtype: torch.dtype) -> None:
    total, hidden = 65_536, 2048
    words = torch.randn((total, hidden), dtype=dtype, device="cuda", requires_grad=True)
    groups = word_groups(torch.arange(total, device="cuda") // 2)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contrastive_loss(words, groups, temperature=TEMPERATURE).backward()
    # in addition to the words; the bound
    assert torch.cuda.max_memory_allocated() - before < 2 << 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_never_waits_for_the_gpu(dtype: torch.dtype) -> None:
    words, groups = make_words(300, 64).to(dtype), word_groups(make_group(300, 100))
    loss_and_gradient(contrastive_loss, words, groups)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradient(contrastive_loss, words, word_groups(groups.group))
    finally:
        torch.cuda.set_sync_debug_mode("default")
