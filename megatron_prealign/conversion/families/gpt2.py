"""GPT-2: LayerNorm, biases, learned positions; transformers stores its matrices as input x output."""

from megatron_prealign.conversion.family import Direct, Family, FusedQKV, ParamMapping

ATTENTION = "decoder.layers.self_attention."
MLP = "decoder.layers.mlp."


def _norm(mcore_prefix: str, hf_prefix: str, mcore_names: tuple[str, str]) -> tuple[ParamMapping, ...]:
    names = zip(mcore_names, ("weight", "bias"), strict=True)
    return tuple(Direct(f"{mcore_prefix}{mcore}", f"{hf_prefix}.{hf}", ("hidden",)) for mcore, hf in names)


FUSED_NORM = ("layer_norm_weight", "layer_norm_bias")

FAMILY = Family(
    name="gpt2",
    title="GPT-2",
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    base_prefix="transformer.",
    fields={
        "n_embd": "hidden_size",
        "n_inner": "ffn_hidden_size",
        "n_layer": "num_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "layer_norm_epsilon": "layernorm_epsilon",
        "initializer_range": "init_method_std",
        "resid_pdrop": "hidden_dropout",
        "embd_pdrop": "hidden_dropout",
        "attn_pdrop": "attention_dropout",
        "tie_word_embeddings": "share_embeddings_and_output_weights",
    },
    required=frozenset({"n_embd", "n_layer", "n_head", "n_positions", "vocab_size"}),
    defaults={
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "tie_word_embeddings": True,
    },
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    },
    # n_ctx is an older name of n_positions that transformers does not read; the rest configures other heads.
    ignored=frozenset(
        {
            "n_ctx",
            "summary_type",
            "summary_use_proj",
            "summary_activation",
            "summary_proj_to_labels",
            "summary_first_dropout",
            "gradient_checkpointing",
        }
    ),
    rope=False,
    first=(
        Direct("embedding.word_embeddings.weight", "transformer.wte.weight", ("vocab", "hidden"), partition_dim=0),
        Direct("embedding.position_embeddings.weight", "transformer.wpe.weight", ("positions", "hidden")),
    ),
    layer=(
        *_norm(f"{ATTENTION}linear_qkv.", "ln_1", FUSED_NORM),
        FusedQKV(f"{ATTENTION}linear_qkv.weight", "attn.c_attn.weight"),
        FusedQKV(f"{ATTENTION}linear_qkv.bias", "attn.c_attn.bias", bias=True),
        Direct(
            f"{ATTENTION}linear_proj.weight",
            "attn.c_proj.weight",
            ("hidden", "query"),
            partition_dim=1,
            transposed=True,
        ),
        Direct(f"{ATTENTION}linear_proj.bias", "attn.c_proj.bias", ("hidden",)),
        *_norm(f"{MLP}linear_fc1.", "ln_2", FUSED_NORM),
        Direct(f"{MLP}linear_fc1.weight", "mlp.c_fc.weight", ("ffn", "hidden"), partition_dim=0, transposed=True),
        Direct(f"{MLP}linear_fc1.bias", "mlp.c_fc.bias", ("ffn",), partition_dim=0),
        Direct(f"{MLP}linear_fc2.weight", "mlp.c_proj.weight", ("hidden", "ffn"), partition_dim=1, transposed=True),
        Direct(f"{MLP}linear_fc2.bias", "mlp.c_proj.bias", ("hidden",)),
    ),
    last=_norm("decoder.final_layernorm.", "transformer.ln_f", ("weight", "bias")),
    output=Direct("output_layer.weight", "lm_head.weight", ("vocab", "hidden"), partition_dim=0),
    layer_prefix="transformer.h.{}.",
    buffer_suffixes=(".attn.bias", ".attn.masked_bias"),
)
