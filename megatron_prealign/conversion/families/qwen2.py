"""Qwen2 and Qwen2.5: Llama's tensors, with query, key and value biases."""

from megatron_prealign.conversion.families import llama
from megatron_prealign.conversion.family import QKV, Family

BIAS = QKV(
    f"{llama.ATTENTION}linear_qkv.bias",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.bias",
    "self_attn.v_proj.bias",
    bias=True,
)

FAMILY = Family(
    name="qwen2",
    title="Qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    base_prefix="model.",
    fields={hf: mcore for hf, mcore in llama.FIELDS.items() if hf != "head_dim"},
    required=llama.REQUIRED,
    defaults={**llama.DEFAULTS, "max_position_embeddings": 32768, "num_key_value_heads": 32},
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    # Used only with use_sliding_window.
    ignored=frozenset({"sliding_window", "max_window_layers", "use_mrope"}),
    rope=True,
    first=llama.FIRST,
    layer=(*llama.LAYER, BIAS),
    last=llama.LAST,
    output=llama.OUTPUT,
    layer_prefix=llama.LAYER_PREFIX,
    buffer_suffixes=llama.BUFFER_SUFFIXES,
)
