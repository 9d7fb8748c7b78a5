"""FLOPs per token, for throughput and model FLOPs utilisation (MFU). Imports no torch."""

from megatron_prealign.recipe import ModelSection

# Dense bf16 peak without sparsity, in FLOP/s, by a substring of torch.cuda.get_device_name(). Source: vendors' data
# sheets.
PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def forward_flops_per_token(model: ModelSection, *, vocab_size: int, seq_length: int, causal: bool = True) -> float:
    """FLOPs of the forward pass per token. A multiply-add counts as two; only matrix products count, not norms,
    activations and the embedding look-up.

    Args:
        vocab_size: Number of ids of the output layer (the padded size where the padding is computed).
        seq_length: Tokens per sequence; attention grows with it.
        causal: Count only the lower half of the attention scores, which is what a causal kernel computes.
    """
    heads, groups, head_dim = model.num_attention_heads, model.query_groups, model.head_dim
    attention_weights = model.hidden_size * head_dim * (heads + 2 * groups) + heads * head_dim * model.hidden_size
    mlp_weights = model.hidden_size * model.mlp_width * (3 if model.is_rotary else 2)
    scores = 2 * heads * head_dim * seq_length * (0.5 if causal else 1.0)
    per_layer = attention_weights + mlp_weights + scores
    return 2.0 * (model.num_layers * per_layer + model.hidden_size * vocab_size)


def training_flops_per_token(model: ModelSection, *, vocab_size: int, seq_length: int) -> float:
    """FLOPs of the forward and backward pass per token: three times the forward pass (recomputation is not counted, by
    the definition of MFU)."""
    return 3.0 * forward_flops_per_token(model, vocab_size=vocab_size, seq_length=seq_length)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by its name; None if unknown."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name), None)
