"""Megatron-Core weights under Hugging Face names, mapped by hand: a reference independent of the conversion tables."""

from typing import Any

import torch

from support.model_builds import VOCAB_SIZE

Weights = dict[str, torch.Tensor]

LLAMA_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""config.json fields of Llama-like families for the shape of `model_builds.recipe_values`."""


def split_qkv(packed: torch.Tensor, heads: int, groups: int, head_dim: int) -> list[torch.Tensor]:
    """Query, key and value rows of Megatron-Core's matrix (or bias), in which they are packed per group."""
    per_group = packed.reshape(groups, heads // groups + 2, head_dim, *packed.shape[1:])
    parts = per_group[:, :-2], per_group[:, -2:-1], per_group[:, -1:]
    return [part.reshape(-1, *packed.shape[1:]) for part in parts]


def llama_state(mcore: Weights, config: Any) -> Weights:
    """State of a `LlamaForCausalLM` with this `LlamaConfig`."""
    embedding = mcore["embedding.word_embeddings.weight"][:VOCAB_SIZE]
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": mcore["decoder.final_layernorm.weight"],
        "lm_head.weight": embedding if config.tie_word_embeddings else mcore["output_layer.weight"][:VOCAB_SIZE],
    }
    for number in range(config.num_hidden_layers):
        mcore_layer, hf_layer = f"decoder.layers.{number}.", f"model.layers.{number}."
        packed = mcore[f"{mcore_layer}self_attention.linear_qkv.weight"]
        query, key, value = split_qkv(packed, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        gate, up = mcore[f"{mcore_layer}mlp.linear_fc1.weight"].chunk(2)
        state |= {
            f"{hf_layer}self_attn.q_proj.weight": query,
            f"{hf_layer}self_attn.k_proj.weight": key,
            f"{hf_layer}self_attn.v_proj.weight": value,
            f"{hf_layer}self_attn.o_proj.weight": mcore[f"{mcore_layer}self_attention.linear_proj.weight"],
            f"{hf_layer}mlp.gate_proj.weight": gate,
            f"{hf_layer}mlp.up_proj.weight": up,
            f"{hf_layer}mlp.down_proj.weight": mcore[f"{mcore_layer}mlp.linear_fc2.weight"],
            f"{hf_layer}input_layernorm.weight": mcore[f"{mcore_layer}input_layernorm.weight"],
            f"{hf_layer}post_attention_layernorm.weight": mcore[f"{mcore_layer}pre_mlp_layernorm.weight"],
        }
    return state


def gpt2_state(mcore: Weights, config: Any) -> Weights:
    """State of a `GPT2LMHeadModel` with this `GPT2Config`."""
    embedding = mcore["embedding.word_embeddings.weight"][:VOCAB_SIZE]
    state = {
        "transformer.wte.weight": embedding,
        "transformer.wpe.weight": mcore["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": mcore["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": mcore["decoder.final_layernorm.bias"],
        "lm_head.weight": embedding if config.tie_word_embeddings else mcore["output_layer.weight"][:VOCAB_SIZE],
    }
    head_dim = config.n_embd // config.n_head
    for number in range(config.n_layer):
        mcore_layer, hf_layer = f"decoder.layers.{number}.", f"transformer.h.{number}."
        for kind in ("weight", "bias"):
            packed = mcore[f"{mcore_layer}self_attention.linear_qkv.{kind}"]
            state |= {
                f"{hf_layer}ln_1.{kind}": mcore[f"{mcore_layer}input_layernorm.{kind}"],
                f"{hf_layer}ln_2.{kind}": mcore[f"{mcore_layer}pre_mlp_layernorm.{kind}"],
                # transformers stores GPT-2's matrices as input x output.
                f"{hf_layer}attn.c_attn.{kind}": torch.cat(
                    split_qkv(packed, config.n_head, config.n_head, head_dim)
                ).t(),
                f"{hf_layer}attn.c_proj.{kind}": mcore[f"{mcore_layer}self_attention.linear_proj.{kind}"].t(),
                f"{hf_layer}mlp.c_fc.{kind}": mcore[f"{mcore_layer}mlp.linear_fc1.{kind}"].t(),
                f"{hf_layer}mlp.c_proj.{kind}": mcore[f"{mcore_layer}mlp.linear_fc2.{kind}"].t(),
            }
    return state


def filled(model: Any, state: Weights) -> Any:
    """Loads the state into the transformers model; every parameter must be in the state."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith(("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")) for name in missing), missing
    return model.eval()


def llama_config(**options: Any) -> Any:
    """Config for the shape of `model_builds.recipe_values`; `options` override fields."""
    from transformers import LlamaConfig

    return LlamaConfig(**{**LLAMA_SHAPE, "rope_theta": 10000.0, **options})


def gpt2_config(**options: Any) -> Any:
    """Config for the shape of `model_builds.recipe_values`; `options` override fields."""
    from transformers import GPT2Config

    shape = {
        "vocab_size": VOCAB_SIZE,
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 4,
        "n_head": 4,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
    }
    return GPT2Config(**{**shape, **options})


def llama(mcore: Weights, **options: Any) -> Any:
    """transformers' Llama with Megatron-Core weights and the shape of `llama_config`."""
    from transformers import LlamaForCausalLM

    config = llama_config(**options)
    return filled(LlamaForCausalLM(config), llama_state(mcore, config))


def gpt2(mcore: Weights, **options: Any) -> Any:
    """transformers' GPT-2 with Megatron-Core weights and the shape of `gpt2_config`."""
    from transformers import GPT2LMHeadModel

    config = gpt2_config(**options)
    return filled(GPT2LMHeadModel(config), gpt2_state(mcore, config))
