"""Llama 2 and 3: RMSNorm, gated MLP, rotary positions, grouped-query attention, no biases."""

from megatron_prealign.conversion.family import QKV, Direct, Family, GatedMLP, ParamMapping

FIELDS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "share_embeddings_and_output_weights",
}
REQUIRED = frozenset({"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"})
DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
ATTENTION = "decoder.layers.self_attention."
MLP = "decoder.layers.mlp."
FIRST: tuple[ParamMapping, ...] = (
    Direct("embedding.word_embeddings.weight", "model.embed_tokens.weight", ("vocab", "hidden"), partition_dim=0),
)
QUERY_KEY_VALUE = QKV(
    f"{ATTENTION}linear_qkv.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"
)
LAYER: tuple[ParamMapping, ...] = (
    Direct(f"{ATTENTION}linear_qkv.layer_norm_weight", "input_layernorm.weight", ("hidden",)),
    QUERY_KEY_VALUE,
    Direct(f"{ATTENTION}linear_proj.weight", "self_attn.o_proj.weight", ("hidden", "query"), partition_dim=1),
    Direct(f"{MLP}linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", ("hidden",)),
    GatedMLP(f"{MLP}linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    Direct(f"{MLP}linear_fc2.weight", "mlp.down_proj.weight", ("hidden", "ffn"), partition_dim=1),
)
LAST: tuple[ParamMapping, ...] = (Direct("decoder.final_layernorm.weight", "model.norm.weight", ("hidden",)),)
OUTPUT = Direct("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), partition_dim=0)
LAYER_PREFIX = "model.layers.{}."
BUFFER_SUFFIXES = ("rotary_emb.inv_freq",)

FAMILY = Family(
    name="llama",
    title="Llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    base_prefix="model.",
    fields=FIELDS,
    required=REQUIRED,
    defaults={**DEFAULTS, "max_position_embeddings": 2048},
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    rope=True,
    first=FIRST,
    layer=LAYER,
    last=LAST,
    output=OUTPUT,
    layer_prefix=LAYER_PREFIX,
    buffer_suffixes=BUFFER_SUFFIXES,
)
