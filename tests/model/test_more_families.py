"""Every family gives the same logits as transformers with the same random weights."""

from typing import Any

import pytest
import torch
from support.huggingface_weights import LLAMA_SHAPE, filled, llama_state, split_qkv
from support.model_builds import SEQ_LENGTH, perturbed_logits, recipe_values, tokens
from support.workers import WorkerPool
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

# fp32, sums in another order through four layers; logits are of order 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
CONFIG = {
    **LLAMA_SHAPE,
    "max_position_embeddings": SEQ_LENGTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def hf_logits(state: dict[str, torch.Tensor], config: Any) -> torch.Tensor:
    model = filled(AutoModelForCausalLM.from_config(config), state)
    with torch.no_grad():
        return model(tokens()).logits


def layers(mcore: dict[str, torch.Tensor], ending: str) -> list[torch.Tensor]:
    return [mcore[f"decoder.layers.{number}.self_attention.{ending}"] for number in range(CONFIG["num_hidden_layers"])]


def assert_differs(logits: torch.Tensor, state: dict[str, torch.Tensor], config: Any) -> None:
    """The family-specific part changes the logits by more than the tolerance."""
    assert (hf_logits(state, config) - logits).abs().max() > 1e-2


def test_mistral(workers: WorkerPool) -> None:
    """Within the window, Mistral computes the same as Llama."""
    mcore, logits = workers.run(1, perturbed_logits, recipe_values("mistral", {"sliding_window": SEQ_LENGTH}))[0]
    config = MistralConfig(**CONFIG, sliding_window=SEQ_LENGTH)
    state = llama_state(mcore, config)
    torch.testing.assert_close(logits, hf_logits(state, config), **TOLERANCE)
    assert_differs(logits, state, MistralConfig(**CONFIG, sliding_window=SEQ_LENGTH // 2))


def test_qwen2_has_query_key_value_biases(workers: WorkerPool) -> None:
    mcore, logits = workers.run(1, perturbed_logits, recipe_values("qwen2"))[0]
    config = Qwen2Config(**{key: value for key, value in CONFIG.items() if key != "head_dim"})
    state = llama_state(mcore, LlamaConfig(**CONFIG))
    for number, packed in enumerate(layers(mcore, "linear_qkv.bias")):
        for name, part in zip("qkv", split_qkv(packed, 4, 2, 8), strict=True):
            state[f"model.layers.{number}.self_attn.{name}_proj.bias"] = part
    torch.testing.assert_close(logits, hf_logits(state, config), **TOLERANCE)
    without = {key: torch.zeros_like(value) if key.endswith("bias") else value for key, value in state.items()}
    assert_differs(logits, without, config)


def test_qwen3_has_query_and_key_norms(workers: WorkerPool) -> None:
    """With a head dimension other than hidden size / heads."""
    values = recipe_values("qwen3", {"kv_channels": 12})
    mcore, logits = workers.run(1, perturbed_logits, values)[0]
    config = Qwen3Config(**{**CONFIG, "head_dim": 12})
    state = llama_state(mcore, config)
    for name in "qk":
        for number, weight in enumerate(layers(mcore, f"{name}_layernorm.weight")):
            state[f"model.layers.{number}.self_attn.{name}_norm.weight"] = weight
    torch.testing.assert_close(logits, hf_logits(state, config), **TOLERANCE)
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
            # Small, so that all three kinds of frequencies occur: unchanged, scaled and interpolated.
            "original_max_position_embeddings": 10,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_rotary_scaling(workers: WorkerPool, scaling: dict[str, Any]) -> None:
    values = recipe_values("llama", {"rope_scaling": scaling, "rotary_base": 20.0})
    mcore, logits = workers.run(1, perturbed_logits, values)[0]
    config = LlamaConfig(**{**CONFIG, "rope_parameters": {**scaling, "rope_theta": 20.0}})
    state = llama_state(mcore, config)
    torch.testing.assert_close(logits, hf_logits(state, config), **TOLERANCE)
    plain = {"rope_type": "default", "rope_theta": 20.0}
    assert_differs(logits, state, LlamaConfig(**{**CONFIG, "rope_parameters": plain}))
