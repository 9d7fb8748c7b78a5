"""Norms and attention against torch's and Megatron-Core's own."""

from typing import Any

import pytest
import torch
from support.workers import WorkerPool

SHAPE = (5, 2, 12)


def norms(sequence_parallel: bool) -> dict[str, Any]:
    """Runs in a worker: our norms with random weights on random states, and what torch's own give."""
    from megatron.core.transformer import TransformerConfig

    from megatron_prealign.model.norm import LayerNorm, RMSNorm
    from megatron_prealign.runtime import cpu

    cpu.enable()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=SHAPE[-1],
        num_attention_heads=2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=2 if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
    )
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(SHAPE, generator=generator) * 3 + 1
    answers: dict[str, Any] = {"x": x}
    for kind in (RMSNorm, LayerNorm):
        norm = kind(config, SHAPE[-1], eps=0.01)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.randn(SHAPE[-1], generator=generator))
        answers[kind.__name__] = {
            "weights": {name: parameter.detach() for name, parameter in norm.named_parameters()},
            "output": norm(x).detach(),
            "marked": [parameter.sequence_parallel for parameter in norm.parameters()],
        }
    return answers


def attentions(
    heads: int, groups: int, softmax_scale: float | None, starts: list[list[int]] | None = None
) -> dict[str, Any]:
    """Runs in a worker: output and gradients of our attention and of Megatron-Core's, which takes any mask.

    Args:
        starts: `[3, 7]`, where the document of each position starts.
    """
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_prealign.model.attention import FusedCausalAttention, document_mask
    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.runtime.distributed import start

    start(ParallelSection(device="cpu"), seed=1)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_query_groups=groups,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
    )
    tokens, rows = 7, 3
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).repeat(rows, 1, 1, 1)
    for row, firsts in enumerate(starts or []):
        for position, first in enumerate(firsts):
            hidden[row, 0, position, :first] = True
    mask = None if starts is None else document_mask(torch.tensor(starts, dtype=torch.int32), torch.float32)
    answers: dict[str, Any] = {}
    for kind, own_mask in ((FusedCausalAttention, mask), (DotProductAttention, hidden)):
        generator = torch.Generator().manual_seed(5)
        inputs = [
            torch.randn((tokens, rows, count, 8), generator=generator).requires_grad_()
            for count in (heads, groups, groups)
        ]
        attention = kind(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)
        output = attention(*inputs, own_mask)
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        answers[kind.__name__] = [output.detach(), *(each.grad for each in inputs)]
    return answers


def refusals() -> list[str]:
    from types import SimpleNamespace

    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_prealign.model.attention import FusedCausalAttention
    from megatron_prealign.runtime import cpu

    cpu.enable()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True)
    states = torch.zeros(2, 1, 1, 8)
    attention = FusedCausalAttention(config, 1, AttnMaskType.causal, "self")
    split: Any = SimpleNamespace(**{**vars(config), "context_parallel_size": 2})
    messages = []
    for attempt in (
        lambda: FusedCausalAttention(config, 1, AttnMaskType.padding, "self"),
        lambda: FusedCausalAttention(split, 1, AttnMaskType.causal, "self"),
        lambda: attention(states, states, states, None, attention_bias=states),
        lambda: attention(states, states, states, torch.ones(1, 1, 2, 2, dtype=torch.bool)),
    ):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_are_torchs(workers: WorkerPool, sequence_parallel: bool) -> None:
    answers = workers.run(1, norms, sequence_parallel)[0]
    x = answers["x"].double()
    rms, layer = answers["RMSNorm"], answers["LayerNorm"]
    expected = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * rms["weights"]["weight"].double()
    # fp32 against float64.
    torch.testing.assert_close(rms["output"].double(), expected, rtol=1e-5, atol=1e-5)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.01).sqrt() * layer["weights"]["weight"].double()
    torch.testing.assert_close(
        layer["output"].double(), expected + layer["weights"]["bias"].double(), rtol=1e-5, atol=1e-5
    )
    # By this mark Megatron-Core sums their gradients over tensor-parallel ranks.
    assert rms["marked"] == [sequence_parallel]
    assert layer["marked"] == [sequence_parallel] * 2


@pytest.mark.parametrize(("heads", "groups", "softmax_scale"), [(4, 4, None), (4, 2, None), (4, 1, None), (2, 2, 0.05)])
def test_attention_is_megatron_cores(workers: WorkerPool, heads: int, groups: int, softmax_scale: float | None) -> None:
    answers = workers.run(1, attentions, heads, groups, softmax_scale)[0]
    for got, expected in zip(answers["FusedCausalAttention"], answers["DotProductAttention"], strict=True):
        # The same sums in fp32 in another order.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_attention_with_documents_is_megatron_cores(workers: WorkerPool, heads: int, groups: int) -> None:
    # No end, several ones, and padding, of which every position is its own.
    starts = [[0] * 7, [0, 0, 2, 2, 2, 5, 5], [0, 0, 0, 0, 4, 5, 6]]
    answers = workers.run(1, attentions, heads, groups, None, starts)[0]
    plain = workers.run(1, attentions, heads, groups, None)[0]["FusedCausalAttention"]
    for got, expected in zip(answers["FusedCausalAttention"], answers["DotProductAttention"], strict=True):
        # The same sums in fp32 in another order.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(answers["FusedCausalAttention"][0], plain[0], atol=0.01)


def test_attention_refuses_what_it_cannot_compute(workers: WorkerPool) -> None:
    messages = workers.run(1, refusals)[0]
    assert len(messages) == 4
    assert "causal attention only" in messages[0]
    assert "context_parallel_size is 2" in messages[1]
    assert "neither packed sequences nor an attention bias" in messages[2]
    assert "no boolean mask" in messages[3]
