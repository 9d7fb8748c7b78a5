"""Every family is the model of that name in transformers: random weights of ours under their names, same logits."""

from typing import Any

import pytest
import torch
from support.huggingface_weights import filled, llama_state, split_qkv
from support.model_builds import SEQ_LENGTH, VOCAB_SIZE, disturbed_logits, recipe_values, tokens
from support.workers import WorkerPool
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

# fp32, sums in another order through four layers; logits are of order 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": SEQ_LENGTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}


def their_logits(state: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    model = filled(AutoModelForCausalLM.from_config(config), state)
    with torch.no_grad():
        return model(tokens()).logits


def layers(ours: dict[str, torch.Tensor], ending: str) -> list[torch.Tensor]:
    return [ours[f"decoder.layers.{number}.self_attention.{ending}"] for number in range(SHAPE["num_hidden_layers"])]


def assert_differs(logits: torch.Tensor, state: dict[str, torch.Tensor], config: Any) -> None:
    """What the family adds is not lost in the tolerance."""
    assert (their_logits(state, config) - logits).abs().max() > 1e-2


def test_mistral(workers: WorkerPool) -> None:
    """Within the window there is no difference."""
    ours, logits = workers.run(1, disturbed_logits, recipe_values("mistral", {"sliding_window": SEQ_LENGTH}))[0]
    config = MistralConfig(**SHAPE, sliding_window=SEQ_LENGTH)
    state = llama_state(ours, config)
    torch.testing.assert_close(logits, their_logits(state, config), **TOLERANCE)
    assert_differs(logits, state, MistralConfig(**SHAPE, sliding_window=SEQ_LENGTH // 2))


def test_qwen2_has_biases_of_query_key_and_value(workers: WorkerPool) -> None:
    ours, logits = workers.run(1, disturbed_logits, recipe_values("qwen2"))[0]
    config = Qwen2Config(**{key: value for key, value in SHAPE.items() if key != "head_dim"})
    state = llama_state(ours, LlamaConfig(**SHAPE))
    for number, packed in enumerate(layers(ours, "linear_qkv.bias")):
        for name, part in zip("qkv", split_qkv(packed, 4, 2, 8), strict=True):
            state[f"model.layers.{number}.self_attn.{name}_proj.bias"] = part
    torch.testing.assert_close(logits, their_logits(state, config), **TOLERANCE)
    without = {key: torch.zeros_like(value) if key.endswith("bias") else value for key, value in state.items()}
    assert_differs(logits, without, config)


def test_qwen3_has_norms_of_query_and_key(workers: WorkerPool) -> None:
    """With channels of their own, not hidden size over heads."""
    values = recipe_values("qwen3", {"kv_channels": 12})
    ours, logits = workers.run(1, disturbed_logits, values)[0]
    config = Qwen3Config(**{**SHAPE, "head_dim": 12})
    state = llama_state(ours, config)
    for name in "qk":
        for number, weight in enumerate(layers(ours, f"{name}_layernorm.weight")):
            state[f"model.layers.{number}.self_attn.{name}_norm.weight"] = weight
    torch.testing.assert_close(logits, their_logits(state, config), **TOLERANCE)
    without = {key: torch.ones_like(value) if "q_norm" in key else value for key, value in state.items()}
    assert_differs(logits, without, config)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 3.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            # Small, so that waves of all three kinds are there: kept, stretched and in between.
            "original_max_position_embeddings": 10,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rotary_positions_are_stretched(workers: WorkerPool, scaling: dict[str, Any]) -> None:
    values = recipe_values("llama", {"rope_scaling": scaling, "rotary_base": 20.0})
    ours, logits = workers.run(1, disturbed_logits, values)[0]
    config = LlamaConfig(**{**SHAPE, "rope_parameters": {**scaling, "rope_theta": 20.0}})
    state = llama_state(ours, config)
    torch.testing.assert_close(logits, their_logits(state, config), **TOLERANCE)
    plain = {"rope_type": "default", "rope_theta": 20.0}
    assert_differs(logits, state, LlamaConfig(**{**SHAPE, "rope_parameters": plain}))
