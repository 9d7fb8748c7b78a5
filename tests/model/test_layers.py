"""Norms and attention against the implementations of torch and Megatron-Core."""

from typing import Any

import pytest
import torch
from support.messages import assert_facts
from support.workers import WorkerPool

SHAPE = (5, 2, 12)


def norms(sequence_parallel: bool) -> dict[str, Any]:
    """Runs in a worker: RMSNorm and LayerNorm with random weights on random states."""
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
    results: dict[str, Any] = {"x": x}
    for kind in (RMSNorm, LayerNorm):
        norm = kind(config, SHAPE[-1], eps=0.01)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.copy_(torch.randn(SHAPE[-1], generator=generator))
        results[kind.__name__] = {
            "weights": {name: parameter.detach() for name, parameter in norm.named_parameters()},
            "output": norm(x).detach(),
            "sequence_parallel": [parameter.sequence_parallel for parameter in norm.parameters()],
        }
    return results


def attentions(
    heads: int, groups: int, softmax_scale: float | None, starts: list[list[int]] | None = None
) -> dict[str, Any]:
    """Runs in a worker: output and gradients of FusedCausalAttention and of Megatron-Core's attention with any mask.

    Args:
        starts: `[3, 7]`, start of the document of each position.
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
    tokens, batch = 7, 3
    masked = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).repeat(batch, 1, 1, 1)
    for sequence, firsts in enumerate(starts or []):
        for position, first in enumerate(firsts):
            masked[sequence, 0, position, :first] = True
    mask = None if starts is None else document_mask(torch.tensor(starts, dtype=torch.int32), torch.float32)
    results: dict[str, Any] = {}
    for kind, own_mask in ((FusedCausalAttention, mask), (DotProductAttention, masked)):
        generator = torch.Generator().manual_seed(5)
        inputs = [
            torch.randn((tokens, batch, count, 8), generator=generator).requires_grad_()
            for count in (heads, groups, groups)
        ]
        attention = kind(config, 1, AttnMaskType.causal, "self", softmax_scale=softmax_scale)
        output = attention(*inputs, own_mask)
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        results[kind.__name__] = [output.detach(), *(each.grad for each in inputs)]
    return results


def error_messages() -> list[str]:
    from types import SimpleNamespace

    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_prealign.model.attention import FusedCausalAttention
    from megatron_prealign.runtime import cpu

    cpu.enable()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, use_cpu_initialization=True)
    states = torch.zeros(2, 1, 1, 8)
    attention = FusedCausalAttention(config, 1, AttnMaskType.causal, "self")
    context_parallel: Any = SimpleNamespace(**{**vars(config), "context_parallel_size": 2})
    messages = []
    for attempt in (
        lambda: FusedCausalAttention(config, 1, AttnMaskType.padding, "self"),
        lambda: FusedCausalAttention(context_parallel, 1, AttnMaskType.causal, "self"),
        lambda: attention(states, states, states, None, attention_bias=states),
        lambda: attention(states, states, states, torch.ones(1, 1, 2, 2, dtype=torch.bool)),
    ):
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_match_torch(workers: WorkerPool, sequence_parallel: bool) -> None:
    results = workers.run(1, norms, sequence_parallel)[0]
    x = results["x"].double()
    rms, layer = results["RMSNorm"], results["LayerNorm"]
    expected = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * rms["weights"]["weight"].double()
    # fp32 against float64.
    torch.testing.assert_close(rms["output"].double(), expected, rtol=1e-5, atol=1e-5)
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 0.01).sqrt() * layer["weights"]["weight"].double()
    torch.testing.assert_close(
        layer["output"].double(), expected + layer["weights"]["bias"].double(), rtol=1e-5, atol=1e-5
    )
    # With this attribute Megatron-Core sums their gradients over tensor-parallel ranks.
    assert rms["sequence_parallel"] == [sequence_parallel]
    assert layer["sequence_parallel"] == [sequence_parallel] * 2


@pytest.mark.parametrize(("heads", "groups", "softmax_scale"), [(4, 4, None), (4, 2, None), (4, 1, None), (2, 2, 0.05)])
def test_attention_matches_megatron_core(
    workers: WorkerPool, heads: int, groups: int, softmax_scale: float | None
) -> None:
    results = workers.run(1, attentions, heads, groups, softmax_scale)[0]
    for got, expected in zip(results["FusedCausalAttention"], results["DotProductAttention"], strict=True):
        # The same fp32 sums in another order.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2)])
def test_attention_with_document_mask_matches_megatron_core(workers: WorkerPool, heads: int, groups: int) -> None:
    # One document, several, and padding, where every position is its own document.
    starts = [[0] * 7, [0, 0, 2, 2, 2, 5, 5], [0, 0, 0, 0, 4, 5, 6]]
    results = workers.run(1, attentions, heads, groups, None, starts)[0]
    plain = workers.run(1, attentions, heads, groups, None)[0]["FusedCausalAttention"]
    for got, expected in zip(results["FusedCausalAttention"], results["DotProductAttention"], strict=True):
        # The same fp32 sums in another order.
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results["FusedCausalAttention"][0], plain[0], atol=0.01)


def test_unsupported_arguments_are_refused(workers: WorkerPool) -> None:
    messages = workers.run(1, error_messages)[0]
    assert len(messages) == 4
    assert_facts(messages[0], "attn_mask_type", "padding", "causal")
    assert_facts(messages[1], "context_parallel_size is 2")
    assert_facts(messages[2], "packed sequences", "attention bias")
    assert_facts(messages[3], "boolean mask", "document_mask")
