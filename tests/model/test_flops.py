"""FLOPs per token against torch's counter on the real model."""

from typing import Any

import pytest
from support.model_builds import SEQ_LENGTH, build, recipe_values, tokens
from support.workers import WorkerPool

from megatron_prealign.model.flops import forward_flops_per_token, peak_flops, training_flops_per_token
from megatron_prealign.recipe import ModelSection

PADDED = 48


def counted_flops(values: dict[str, Any]) -> float:
    """Runs in a worker: FLOPs of one forward pass counted by torch, per token."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    (chunk,) = build(values)[2]
    batch = tokens()
    # Math attention consists of matrix products, which the counter sees; it computes all scores.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        chunk(batch, torch.arange(SEQ_LENGTH).expand_as(batch), None)
    return counter.get_total_flops() / batch.numel()


@pytest.mark.parametrize(
    ("family", "model"),
    [("llama", {}), ("llama", {"kv_channels": 12, "num_query_groups": 1}), ("gpt2", {}), ("gpt2", {"num_layers": 1})],
)
def test_forward_pass_is_counted_exactly(workers: WorkerPool, family: str, model: dict[str, Any]) -> None:
    values = recipe_values(family, model)
    section = ModelSection(**values["model"])
    expected = forward_flops_per_token(section, vocab_size=PADDED, seq_length=SEQ_LENGTH, causal=False)
    assert workers.run(1, counted_flops, values)[0] == expected


def test_causal_attention_counts_half_the_scores() -> None:
    section = ModelSection(num_layers=3, hidden_size=32, num_attention_heads=4, num_query_groups=2)

    def attention(seq_length: int, causal: bool) -> float:
        counted, without = (
            forward_flops_per_token(section, vocab_size=PADDED, seq_length=length, causal=causal)
            for length in (seq_length, 0)
        )
        return counted - without

    # Scores and weighted sum: two products of 2 * 32 operations for each of 64 tokens, in 3 layers.
    assert attention(64, causal=False) == 3 * 2 * 2 * 32 * 64
    assert attention(64, causal=True) == attention(64, causal=False) / 2


def test_training_is_three_forward_passes() -> None:
    section = ModelSection(num_layers=3, hidden_size=32, num_attention_heads=4)
    assert training_flops_per_token(section, vocab_size=PADDED, seq_length=16) == 3 * forward_flops_per_token(
        section, vocab_size=PADDED, seq_length=16
    )


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Some other card", None),
    ],
)
def test_peak_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
