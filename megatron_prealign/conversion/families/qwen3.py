"""Qwen3: Llama's tensors, with query and key norms."""

from megatron_prealign.conversion.families import llama
from megatron_prealign.conversion.family import Direct, Family

FAMILY = Family(
    name="qwen3",
    title="Qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    base_prefix="model.",
    fields=llama.FIELDS,
    required=llama.REQUIRED,
    defaults={**llama.DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    # Used only with use_sliding_window.
    ignored=frozenset({"sliding_window", "max_window_layers"}),
    rope=True,
    first=llama.FIRST,
    layer=(
        *llama.LAYER,
        Direct(f"{llama.ATTENTION}q_layernorm.weight", "self_attn.q_norm.weight", ("head_dim",)),
        Direct(f"{llama.ATTENTION}k_layernorm.weight", "self_attn.k_norm.weight", ("head_dim",)),
    ),
    last=llama.LAST,
    output=llama.OUTPUT,
    layer_prefix=llama.LAYER_PREFIX,
    buffer_suffixes=llama.BUFFER_SUFFIXES,
)
