"""Recipe section `model`: the architecture, in Megatron-Core's own field names."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary positions are stretched beyond the context that a model was first trained with."""

    rope_type: Literal["llama3", "linear"]
    """linear: all frequencies divided by the factor. llama3: the low ones only, with a smooth passage between."""
    factor: float
    """What frequencies are divided by."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are stretched in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor stay."""
    original_max_position_embeddings: int = 8192
    """llama3: the context before the stretching, in tokens."""

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            require(getattr(self, name) > 0, f"model.rope_scaling.{name}", getattr(self, name), "a number above 0")
        require(
            self.high_freq_factor > self.low_freq_factor,
            "model.rope_scaling.high_freq_factor",
            self.high_freq_factor,
            f"a number above low_freq_factor ({self.low_freq_factor})",
        )


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The GPT model."""

    num_layers: int
    """Number of transformer blocks."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Number of query heads."""
    family: Family = "llama"
    """llama: RMSNorm, SwiGLU, RoPE, no biases. mistral: the same, and a sliding window. qwen2: llama with biases of
    query, key and value. qwen3: llama with norms of query and key. gpt2: LayerNorm, GELU, biases, learned positions."""
    num_query_groups: int | None = None
    """Number of key/value heads (grouped-query attention); null means as many as query heads."""
    ffn_hidden_size: int | None = None
    """Width of the MLP; null means 8/3 of the hidden size rounded up to 64, or 4 times it (gpt2)."""
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
    rotary_base: float = 10000.0
    """Base of the rotary position embedding (not gpt2)."""
    rope_scaling: RopeScaling | None = None
    """Stretching of the rotary positions; null leaves them as they are."""
    sliding_window: int | None = None
    """Tokens that a token attends to, itself included (mistral). Sequences up to this length see no difference, longer
    ones are refused."""
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
        for name in (
            "num_query_groups",
            "ffn_hidden_size",
            "kv_channels",
            "max_position_embeddings",
            "vocab_size",
            "sliding_window",
        ):
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
        self._check_family()

    def _check_family(self) -> None:
        """Refuses what the model of that name does not have: it could be trained, but nothing else would open it."""
        if self.family in ("qwen2", "gpt2"):
            require(
                self.head_dim * self.num_attention_heads == self.hidden_size,
                "model.kv_channels",
                self.kv_channels,
                f"null: the family {self.family} has hidden_size / num_attention_heads channels a head",
            )
        if self.family == "gpt2":
            require(
                self.query_groups == self.num_attention_heads,
                "model.num_query_groups",
                self.num_query_groups,
                "null: the family gpt2 has as many key/value heads as query heads",
            )
            require(self.rope_scaling is None, "model.rope_scaling", "set", "null: gpt2 learns its positions")
        require(
            self.sliding_window is None or self.family == "mistral",
            "model.sliding_window",
            self.sliding_window,
            f"null, or model.family mistral instead of {self.family}",
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
        """Rotary positions, RMSNorm and a gated MLP without biases: every family but gpt2."""
        return self.family != "gpt2"

    @property
    def add_qkv_bias(self) -> bool:
        """Biases of query, key and value alone."""
        return self.family == "qwen2"

    @property
    def qk_layernorm(self) -> bool:
        """Norms of query and key."""
        return self.family == "qwen3"
