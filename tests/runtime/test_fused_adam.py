"""FusedAdamW against torch's own AdamW."""

import copy

import pytest
import torch

from megatron_prealign.runtime.adam import FusedAdamW

STEPS = 20


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((5, 3), (7,), (2, 2))]


def groups(tensors: list[torch.nn.Parameter]) -> list[dict[str, object]]:
    """As Megatron-Core makes them: matrices decay, vectors do not."""
    return [
        {"params": [tensors[0], tensors[2]], "weight_decay": 0.1},
        {"params": [tensors[1]], "weight_decay": 0.0, "lr": 3e-3},
    ]


def run(optimizer: torch.optim.Optimizer, tensors: list[torch.nn.Parameter], first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for number, tensor in enumerate(tensors):
            gradient = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            # The last parameter has no gradient at first, as in a frozen layer.
            tensor.grad = None if number == 2 and step < 5 else gradient
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.97
        optimizer.step()


def build(kind: type, tensors: list[torch.nn.Parameter], **options: object) -> torch.optim.Optimizer:
    return kind(groups(tensors), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, **options)


@pytest.mark.parametrize("fused", [True, False])
def test_same_weights_as_torch_adamw(fused: bool) -> None:
    ours, reference = parameters(), parameters()
    run(build(FusedAdamW, ours), ours, 5, 5 + STEPS)
    run(build(torch.optim.AdamW, reference, fused=fused), reference, 5, 5 + STEPS)
    for got, expected in zip(ours, reference, strict=True):
        if fused:
            assert torch.equal(got, expected)
        else:
            # torch's unfused implementation rounds in another order: a few units in the last place over 20 steps.
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_step_is_kept_in_the_group_and_moments_in_fp32() -> None:
    tensors = parameters(torch.bfloat16)
    optimizer = build(FusedAdamW, tensors)
    optimizer.add_param_group({"params": []})
    for tensor in tensors:
        tensor.grad = None
    optimizer.step()
    # A rank whose shard of a group is empty saves the same count as the others.
    assert [group["step"] for group in optimizer.param_groups] == [1, 1, 1]
    assert all(isinstance(group["step"], int) for group in optimizer.param_groups)
    assert not optimizer.state
    fp32 = parameters()
    optimizer = build(FusedAdamW, fp32)
    run(optimizer, fp32, 5, 8)
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    for tensor in fp32:
        assert set(optimizer.state[tensor]) == {"exp_avg", "exp_avg_sq"}
        assert all(moment.dtype is torch.float32 for moment in optimizer.state[tensor].values())


def test_saved_state_resumes_bit_for_bit() -> None:
    uninterrupted, resumed = parameters(), parameters()
    optimizer = build(FusedAdamW, uninterrupted)
    run(optimizer, uninterrupted, 0, STEPS)
    first = build(FusedAdamW, resumed)
    run(first, resumed, 0, STEPS // 2)
    state = copy.deepcopy(first.state_dict())
    second = build(FusedAdamW, resumed)
    second.load_state_dict(state)
    run(second, resumed, STEPS // 2, STEPS)
    for got, expected in zip(resumed, uninterrupted, strict=True):
        assert torch.equal(got, expected)


def test_each_group_has_its_own_rate_and_decay() -> None:
    decayed, plain = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdamW([{"params": [decayed], "weight_decay": 0.5}, {"params": [plain], "lr": 0.2}], lr=0.1)
    for tensor in (decayed, plain):
        tensor.grad = torch.zeros(2)
    optimizer.step()
    # Zero gradient: only the decay remains, lr * weight_decay of the weight, rounded once.
    assert decayed.tolist() == pytest.approx([0.95, 0.95], rel=1e-6)
    assert plain.tolist() == [1.0, 1.0]


def test_unsupported_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match="adam_w_mode is False"):
        FusedAdamW(parameters(), adam_w_mode=False)
    with pytest.raises(ValueError, match="closure"):
        build(FusedAdamW, parameters()).step(lambda: 0.0)  # type: ignore[call-overload]
