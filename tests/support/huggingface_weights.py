"""Our weights under the names of transformers, written out by hand: what a test compares the models by."""

from typing import Any

import torch

from support.model_builds import VOCAB_SIZE

Weights = dict[str, torch.Tensor]


def split_qkv(packed: torch.Tensor, heads: int, groups: int, channels: int) -> list[torch.Tensor]:
    """Query, key and value rows of Megatron-Core's matrix (or bias), which packs them group by group."""
    per_group = packed.reshape(groups, heads // groups + 2, channels, *packed.shape[1:])
    parts = per_group[:, :-2], per_group[:, -2:-1], per_group[:, -1:]
    return [part.reshape(-1, *packed.shape[1:]) for part in parts]


def llama_state(ours: Weights, config: Any) -> Weights:
    """State of a `LlamaForCausalLM` with this `LlamaConfig`."""
    embedding = ours["embedding.word_embeddings.weight"][:VOCAB_SIZE]
    state = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": embedding if config.tie_word_embeddings else ours["output_layer.weight"][:VOCAB_SIZE],
    }
    for number in range(config.num_hidden_layers):
        mine, theirs = f"decoder.layers.{number}.", f"model.layers.{number}."
        packed = ours[f"{mine}self_attention.linear_qkv.weight"]
        query, key, value = split_qkv(packed, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        gate, up = ours[f"{mine}mlp.linear_fc1.weight"].chunk(2)
        state |= {
            f"{theirs}self_attn.q_proj.weight": query,
            f"{theirs}self_attn.k_proj.weight": key,
            f"{theirs}self_attn.v_proj.weight": value,
            f"{theirs}self_attn.o_proj.weight": ours[f"{mine}self_attention.linear_proj.weight"],
            f"{theirs}mlp.gate_proj.weight": gate,
            f"{theirs}mlp.up_proj.weight": up,
            f"{theirs}mlp.down_proj.weight": ours[f"{mine}mlp.linear_fc2.weight"],
            f"{theirs}input_layernorm.weight": ours[f"{mine}input_layernorm.weight"],
            f"{theirs}post_attention_layernorm.weight": ours[f"{mine}pre_mlp_layernorm.weight"],
        }
    return state


def gpt2_state(ours: Weights, config: Any) -> Weights:
    """State of a `GPT2LMHeadModel` with this `GPT2Config`."""
    embedding = ours["embedding.word_embeddings.weight"][:VOCAB_SIZE]
    state = {
        "transformer.wte.weight": embedding,
        "transformer.wpe.weight": ours["embedding.position_embeddings.weight"],
        "transformer.ln_f.weight": ours["decoder.final_layernorm.weight"],
        "transformer.ln_f.bias": ours["decoder.final_layernorm.bias"],
        "lm_head.weight": embedding if config.tie_word_embeddings else ours["output_layer.weight"][:VOCAB_SIZE],
    }
    channels = config.n_embd // config.n_head
    for number in range(config.n_layer):
        mine, theirs = f"decoder.layers.{number}.", f"transformer.h.{number}."
        for kind in ("weight", "bias"):
            packed = ours[f"{mine}self_attention.linear_qkv.{kind}"]
            state |= {
                f"{theirs}ln_1.{kind}": ours[f"{mine}input_layernorm.{kind}"],
                f"{theirs}ln_2.{kind}": ours[f"{mine}pre_mlp_layernorm.{kind}"],
                # transformers' GPT-2 keeps its matrices as input x output.
                f"{theirs}attn.c_attn.{kind}": torch.cat(split_qkv(packed, config.n_head, config.n_head, channels)).t(),
                f"{theirs}attn.c_proj.{kind}": ours[f"{mine}self_attention.linear_proj.{kind}"].t(),
                f"{theirs}mlp.c_fc.{kind}": ours[f"{mine}mlp.linear_fc1.{kind}"].t(),
                f"{theirs}mlp.c_proj.{kind}": ours[f"{mine}mlp.linear_fc2.{kind}"].t(),
            }
    return state


def filled(model: Any, state: Weights) -> Any:
    """The transformers model with this state; nothing of it is left as it was."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith(("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")) for name in missing), missing
    return model.eval()


def llama_config(**options: Any) -> Any:
    """Of the shape of `model_builds.recipe_values`, unless changed."""
    from transformers import LlamaConfig

    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**shape, **options})


def gpt2_config(**options: Any) -> Any:
    """Of the shape of `model_builds.recipe_values`, unless changed."""
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


def llama(ours: Weights, **options: Any) -> Any:
    """transformers' Llama with our weights and the shape of `llama_config`."""
    from transformers import LlamaForCausalLM

    config = llama_config(**options)
    return filled(LlamaForCausalLM(config), llama_state(ours, config))


def gpt2(ours: Weights, **options: Any) -> Any:
    """transformers' GPT-2 with our weights and the shape of `gpt2_config`."""
    from transformers import GPT2LMHeadModel

    config = gpt2_config(**options)
    return filled(GPT2LMHeadModel(config), gpt2_state(ours, config))
