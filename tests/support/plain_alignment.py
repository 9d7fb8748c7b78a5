"""One step of the alignment phase in float64 and one process, independent of the package.

Uses transformers' model with the package's weights; every word has its own forward pass without padding. Gradients have
Megatron-Core's names: the weights are mapped to transformers' names by a linear map that autograd differentiates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from support.huggingface_weights import Weights, gpt2_config, gpt2_state, llama_config, llama_state
from support.plain_losses import contrastive_matrix, next_token_loss


@dataclass(frozen=True)
class Step:
    """Inputs of the losses of one step.

    Attributes:
        words: token ids of each word, none empty.
        groups: group of each word.
        rows: token ids `[rows, sequence + 1]`, the last column is a label only; without rows there is no LM loss.
        eod_id: positions with this input have no next-token loss.
        layer_weights: weight of each aligned layer.
    """

    words: Sequence[Sequence[int]]
    groups: Sequence[int]
    rows: torch.Tensor
    eod_id: int
    layer_weights: dict[int, float]
    temperature: float = 0.1
    alpha: float = 1.0
    gamma: float = 0.0
    lm_weight: float = 1.0


@dataclass(frozen=True)
class Expected:
    """Losses as floats, gradients in float64 under Megatron-Core's names."""

    loss: float
    lm_loss: float
    alignment_loss: dict[int, float]
    penalty: float
    gradients: Weights = field(repr=False)


class DoubleRMSNorm(torch.nn.Module):
    """transformers' norm without the cast to float32."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


class DoubleRotary(torch.nn.Module):
    """transformers' rotary angles without the cast to float32."""

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (position_ids[..., None].double() * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()


def _double_llama(config: Any) -> Any:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        block.input_layernorm = DoubleRMSNorm(config.hidden_size, config.rms_norm_eps)
        block.post_attention_layernorm = DoubleRMSNorm(config.hidden_size, config.rms_norm_eps)
    model.model.norm = DoubleRMSNorm(config.hidden_size, config.rms_norm_eps)
    model.model.rotary_emb = DoubleRotary(config.head_dim, config.rope_parameters["rope_theta"])
    return model


def word_states(forward: Any, output_rows: torch.Tensor, words: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Mean state of each word at every layer, then the mean of its output embeddings; `[words, hidden]` each."""
    alone = []
    for word in words:
        states = forward(torch.tensor([list(word)])).hidden_states
        alone.append([state[0].mean(0) for state in states] + [output_rows[list(word)].mean(0)])
    return [torch.stack(layer) for layer in zip(*alone, strict=True)]


def projected(states: torch.Tensor, weights: Weights, head: str) -> torch.Tensor:
    """Inputs of the loss: the states, or the outputs of the layer's head."""
    if f"{head}.weight_1" not in weights:
        return states
    inner = (states @ weights[f"{head}.weight_1"].t() + weights[f"{head}.bias_1"]).clamp(min=0.0)
    return inner @ weights[f"{head}.weight_2"].t() + weights[f"{head}.bias_2"]


def plain_step(family: str, tied: bool, weights: Weights, step: Step) -> Expected:
    """Losses and gradients of `step` for a model with the shape of `model_builds.recipe_values`.

    Args:
        weights: under Megatron-Core's names; layer N has a head if there is a `projection_heads.layer_N.weight_1`.
    """
    from transformers import GPT2LMHeadModel

    leaves = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    if family == "llama":
        config = llama_config(tie_word_embeddings=tied, attn_implementation="sdpa")
        model, state = _double_llama(config), llama_state(leaves, config)
    else:
        config = gpt2_config(tie_word_embeddings=tied, attn_implementation="sdpa")
        model, state = GPT2LMHeadModel(config), gpt2_state(leaves, config)
    model.double().eval()
    assert state.keys() >= {name for name, _ in model.named_parameters()}

    def forward(tokens: torch.Tensor) -> Any:
        return torch.func.functional_call(model, state, (tokens,), {"output_hidden_states": True})

    states = word_states(forward, state["lm_head.weight"], step.words)
    losses, penalties = {}, {}
    for layer in step.layer_weights:
        seen = projected(states[layer], leaves, f"projection_heads.layer_{layer}")
        losses[layer], penalties[layer] = contrastive_matrix(seen, step.groups, step.temperature)
    nothing = torch.zeros((), dtype=torch.float64)
    aligned = sum((weight * losses[layer] for layer, weight in step.layer_weights.items()), nothing)
    penalty = sum((weight * penalties[layer] for layer, weight in step.layer_weights.items()), nothing)
    lm_loss = nothing
    if len(step.rows):
        inputs, labels = step.rows[:, :-1], step.rows[:, 1:]
        lm_loss = next_token_loss(forward(inputs).logits, labels, inputs != step.eod_id)
    total = step.alpha * aligned + step.gamma * penalty + step.lm_weight * lm_loss
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return Expected(
        loss=total.item(),
        lm_loss=lm_loss.item(),
        alignment_loss={layer: loss.item() for layer, loss in losses.items()},
        penalty=penalty.item(),
        gradients={
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
        },
    )
