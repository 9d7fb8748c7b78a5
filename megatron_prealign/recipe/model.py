"""Recipe section `model`: the architecture, with Megatron-Core's field names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_prealign.recipe.checks import MOST_LAYERS, require

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary positions beyond the context length that the model was first trained with."""

    rope_type: Literal["llama3", "linear"]
    """linear divides all frequencies by factor. llama3 divides only the low ones, with a smooth transition."""
    factor: float
    """Divisor of the frequencies."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are scaled fully."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are not scaled."""
    original_max_position_embeddings: int = 8192
    """llama3: context length before scaling, in tokens."""

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            require(getattr(self, name) > 0, f"model.rope_scaling.{name}", getattr(self, name), "a positive number")
        require(
            self.high_freq_factor > self.low_freq_factor,
            "model.rope_scaling.high_freq_factor",
            self.high_freq_factor,
            f"more than low_freq_factor ({self.low_freq_factor})",
        )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Architecture of the GPT model."""

    num_layers: int
    """Number of transformer blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Number of query heads."""
    family: Family = "llama"
    """llama: RMSNorm, SwiGLU, RoPE, no biases. mistral: llama with a sliding window. qwen2: llama with biases for
    query, key and value. qwen3: llama with query and key norms. gpt2: LayerNorm, GELU, biases, learned positions."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); null means num_attention_heads."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null means 8/3 x hidden_size rounded up to a multiple of 64, or 4 x hidden_size for gpt2."""
    kv_channels: int | None = None
    """Head dimension; null means hidden_size / num_attention_heads."""
    max_position_embeddings: int | None = None
    """Maximum sequence length in tokens; null means data.seq_length."""
    vocab_size: int | None = None
    """Vocabulary size before padding; null means the vocabulary size of the tokenizer."""
    make_vocab_size_divisible_by: int = 128
    """Pad the vocabulary to a multiple of this value x tensor_model_parallel_size."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output layer to the input embedding."""
    rotary_base: float = 10000.0
    """Base of the rotary position embedding; not used by gpt2."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary positions; null means no scaling."""
    sliding_window: int | None = None
    """Attention window in tokens, including the token itself (mistral only); null means no window. Must be
    at least data.seq_length, because training does not support attention windows."""
    layernorm_epsilon: float = 1e-5
    """Epsilon of RMSNorm and LayerNorm."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    embedding_std: float | None = None
    """Standard deviation of the initial input and output embeddings; null means init_method_std. Megatron-Core's
    embedding_init_method_std sets the input embeddings only."""
    equal_clone_embeddings: bool = False
    """Start with equal embeddings of every token and its clone, input and output: perfect alignment at the start, which
    studies compare with. Only with a clone tokenizer."""
    hidden_dropout: float = 0.0
    """Dropout probability on the residual stream."""
    attention_dropout: float = 0.0
    """Dropout probability on the attention weights."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Layer implementation: local is plain PyTorch with fused attention; transformer_engine is NVIDIA Transformer
    Engine, which must be installed."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Activation recomputation: null stores all activations, selective recomputes attention, full recomputes whole
    blocks."""
    recompute_num_layers: int = 1
    """Number of blocks per recomputed unit if recompute_granularity is full."""

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
            require(getattr(self, name) > 0, f"model.{name}", getattr(self, name), "a positive number")
        require(self.num_layers <= MOST_LAYERS, "model.num_layers", self.num_layers, f"at most {MOST_LAYERS:,}")
        for name in (
            "num_query_groups",
            "ffn_hidden_size",
            "kv_channels",
            "max_position_embeddings",
            "vocab_size",
            "sliding_window",
            "embedding_std",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, f"model.{name}", value, "null or a positive number")
        if self.kv_channels is None:
            require(
                self.hidden_size % self.num_attention_heads == 0,
                "model.hidden_size",
                self.hidden_size,
                f"a multiple of model.num_attention_heads ({self.num_attention_heads}), or set model.kv_channels",
                "model.num_attention_heads",
                "model.kv_channels",
            )
        require(
            self.num_query_groups is None or self.num_attention_heads % self.num_query_groups == 0,
            "model.num_query_groups",
            self.num_query_groups,
            f"a divisor of model.num_attention_heads ({self.num_attention_heads})",
            "model.num_attention_heads",
        )
        for name in ("hidden_dropout", "attention_dropout"):
            require(0.0 <= getattr(self, name) < 1.0, f"model.{name}", getattr(self, name), "a number in [0, 1)")
        self._check_family()

    def _check_family(self) -> None:
        """Checks that the architecture exists in the model family: other software could not load it otherwise."""
        if self.family in ("qwen2", "gpt2"):
            require(
                self.head_dim * self.num_attention_heads == self.hidden_size,
                "model.kv_channels",
                self.kv_channels,
                f"null: the head dimension of {self.family} is hidden_size / num_attention_heads",
            )
        if self.family == "gpt2":
            require(
                self.query_groups == self.num_attention_heads,
                "model.num_query_groups",
                self.num_query_groups,
                "null: gpt2 has as many key/value heads as query heads",
            )
            require(self.rope_scaling is None, "model.rope_scaling", "set", "null: gpt2 has learned positions")
        require(
            self.sliding_window is None or self.family == "mistral",
            "model.sliding_window",
            self.sliding_window,
            f"null with model.family {self.family}; only mistral has a sliding window",
            "model.family",
        )

    @property
    def query_groups(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return -(-8 * self.hidden_size // 3 // 64) * 64 if self.is_rotary else 4 * self.hidden_size

    @property
    def is_rotary(self) -> bool:
        """Whether the family has rotary positions, RMSNorm and a gated MLP without biases: all but gpt2."""
        return self.family != "gpt2"

    @property
    def add_qkv_bias(self) -> bool:
        """Whether query, key and value have biases while all other layers have none."""
        return self.family == "qwen2"

    @property
    def qk_layernorm(self) -> bool:
        """Whether query and key are normalised."""
        return self.family == "qwen3"


def resolved_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a section `model`, with the sizes that null stands for, so that equal models have equal values.

    Leaves out max_position_embeddings of rotary positions, which does not affect the computation. Values that are not a
    valid section are returned unchanged.
    """
    try:
        section = ModelSection(**{**values, "rope_scaling": None})
    except (TypeError, ValueError):
        return dict(values)
    sizes = {
        "num_query_groups": section.query_groups,
        "ffn_hidden_size": section.mlp_width,
        "kv_channels": section.head_dim,
    }
    resolved = {**values, **sizes}
    if section.is_rotary:
        resolved.pop("max_position_embeddings", None)
    return resolved
