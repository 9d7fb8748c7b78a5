"""Recipe section `model`: the architecture, in Megatron-Core's own field names."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The GPT model."""

    num_layers: int
    """Number of transformer blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Number of query heads."""
    family: Literal["llama", "gpt2"] = "llama"
    """llama: RMSNorm, SwiGLU, RoPE, no biases. gpt2: LayerNorm, GELU, biases, learned positions."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); null means as many as query heads."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null means 8/3 of the hidden size rounded up to 64 (llama) or 4 times it (gpt2)."""
    kv_channels: int | None = None
    """Channels of one head; null means hidden_size / num_attention_heads."""
    max_position_embeddings: int | None = None
    """Longest sequence the model can take, in tokens; null means data.seq_length."""
    vocab_size: int | None = None
    """True number of token ids; null means the tokenizer's. The weights are padded to a multiple that tensor
    parallelism needs."""
    make_vocab_size_divisible_by: int = 128
    """The padded vocabulary is a multiple of this times tensor_model_parallel_size."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the input embedding."""
    rotary_base: int = 10000
    """Base of the rotary position embedding (llama family)."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of RMSNorm and LayerNorm."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    hidden_dropout: float = 0.0
    """Dropout on the residual stream."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layer implementation: plain torch with fused attention, or NVIDIA Transformer Engine (must be installed)."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recomputation: null keeps all activations, selective recomputes attention, full whole blocks."""
    recompute_num_layers: int = 1
    """Blocks per recomputed unit when recompute_granularity is full."""

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "make_vocab_size_divisible_by",
            "rotary_base",
            "layernorm_epsilon",
            "init_method_std",
            "recompute_num_layers",
        ):
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "a number above 0")
        for name in ("num_query_groups", "ffn_hidden_size", "kv_channels", "max_position_embeddings", "vocab_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}", value, "null or a number above 0")
        if self.kv_channels is None:
            require(
                self.hidden_size % self.num_attention_heads == 0,
                "model.hidden_size",
                self.hidden_size,
                f"a multiple of model.num_attention_heads ({self.num_attention_heads}), or set model.kv_channels",
            )
        require(
            self.num_query_groups is None or self.num_attention_heads % self.num_query_groups == 0,
            "model.num_query_groups",
            self.num_query_groups,
            f"a divisor of model.num_attention_heads ({self.num_attention_heads})",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            require(0.0 <= getattr(self, name) < 1.0, f"model.{name}", getattr(self, name), "at least 0 and below 1")

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_channels(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // 3 // 64) * 64 if self.family == "llama" else 4 * self.hidden_size
