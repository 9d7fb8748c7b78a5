"""Llama and GPT-2 give the same logits as transformers with the same weights."""

from typing import Any

import pytest
import torch
from support.huggingface_weights import gpt2, llama
from support.model_builds import SEQ_LENGTH, perturbed_logits, recipe_values, tokens
from support.workers import WorkerPool

# fp32, sums in another order through four layers; logits are of order 1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def assert_same_logits(logits: torch.Tensor, model: Any) -> None:
    with torch.no_grad():
        expected = model(tokens()).logits
    torch.testing.assert_close(logits, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, {}),
        (
            {"num_query_groups": 4, "share_embeddings_and_output_weights": True},
            {"num_key_value_heads": 4, "tie_word_embeddings": True},
        ),
        (
            {"num_query_groups": 1, "kv_channels": 12, "rotary_base": 500, "layernorm_epsilon": 1e-2},
            {"num_key_value_heads": 1, "head_dim": 12, "rope_theta": 500.0, "rms_norm_eps": 1e-2},
        ),
    ],
    ids=["grouped_queries", "tied", "custom_head_dim_base_epsilon"],
)
def test_llama_is_llama(workers: WorkerPool, fields: dict[str, Any], options: dict[str, Any]) -> None:
    weights, logits = workers.run(1, perturbed_logits, recipe_values("llama", fields))[0]
    assert_same_logits(logits, llama(weights, max_position_embeddings=SEQ_LENGTH, **options))


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_is_gpt2(workers: WorkerPool, tied: bool) -> None:
    values = recipe_values("gpt2", {"share_embeddings_and_output_weights": tied})
    weights, logits = workers.run(1, perturbed_logits, values)[0]
    assert_same_logits(logits, gpt2(weights, n_positions=SEQ_LENGTH, tie_word_embeddings=tied))
