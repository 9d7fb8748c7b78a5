"""Small models for tests; the functions run in workers."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from support.tiny import recipe_of

VOCAB_SIZE = 40
SEQ_LENGTH = 12


def recipe_values(family: str, model: dict[str, Any] | None = None, **sections: dict[str, Any]) -> dict[str, Any]:
    """Recipe values for a small model. The files it names are never opened."""
    values: dict[str, Any] = {
        "model": {
            "family": family,
            "num_layers": 4,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 4 if family == "gpt2" else 2,
            "ffn_hidden_size": 48,
            "make_vocab_size_divisible_by": 16,
            **(model or {}),
        },
        "data": {"tokenizer": "t", "seq_length": SEQ_LENGTH, "sources": [{"path": "p", "language": "en"}]},
        "optimizer": {"lr": 0.001},
        "training": {
            "seed": 1,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 1,
            "precision": "fp32",
        },
        "logging": {"run_dir": "unused"},
        "parallel": {"device": "cpu"},
    }
    for name, changes in sections.items():
        values[name] = {**values.get(name, {}), **changes}
    return values


def build(values: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """Recipe, runtime and model chunks of this process."""
    from megatron_prealign.model.build import build_model
    from megatron_prealign.runtime.distributed import start

    with tempfile.TemporaryDirectory() as directory:
        recipe = recipe_of(values, Path(directory))
    runtime = start(recipe.parallel, seed=recipe.training.seed)
    return recipe, runtime, build_model(recipe, runtime, vocab_size=VOCAB_SIZE)


def weights(chunk: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in chunk.named_parameters()}


def initial_weights(values: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Runs in workers: all parameters of this process, by model chunk."""
    return [weights(chunk) for chunk in build(values)[2]]


def perturb(chunk: Any) -> None:
    """Randomises all parameters, so that a norm or bias that is left out changes the result."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in chunk.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.add_(0.3 * noise)
            else:
                # Larger than the initial weights, so that attention is far from uniform.
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(3))


def perturbed_logits(values: dict[str, Any]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Runs in a worker: weights and logits `[2, sequence, vocabulary]` of a model with randomised parameters."""
    (chunk,) = build(values)[2]
    perturb(chunk)
    rows = tokens()
    positions = torch.arange(SEQ_LENGTH).expand_as(rows)
    with torch.no_grad():
        logits = chunk(rows, positions, None)
    return weights(chunk), logits[..., :VOCAB_SIZE].clone()


def states_by_hand(
    chunk: Any, ids: torch.Tensor, positions: torch.Tensor, lengths: list[int], num_layers: int
) -> dict[int, torch.Tensor]:
    """Mean state of each word at every layer, from one plain forward pass, with the autograd graph.

    Args:
        ids: `[slots, tokens]`.
        positions: `[slots, tokens]`.
        lengths: Number of tokens of each word; 0 for an empty slot, whose mean is 0.
    """
    outputs: dict[int, torch.Tensor] = {}

    def record(layer: int) -> Callable[..., None]:
        return lambda module, args, output: outputs.update({layer: output[0] if isinstance(output, tuple) else output})

    handles = [chunk.embedding.register_forward_hook(record(0))]
    handles += [layer.register_forward_hook(record(layer.layer_number)) for layer in chunk.decoder.layers]
    # The state of the last block is the one after the final norm, which overwrites the earlier one.
    handles.append(chunk.decoder.final_layernorm.register_forward_hook(record(num_layers)))
    chunk(ids, positions, None)
    for handle in handles:
        handle.remove()
    zeros = torch.zeros(chunk.config.hidden_size)
    states = {
        layer: torch.stack([hidden[:length, slot].mean(0) if length else zeros for slot, length in enumerate(lengths)])
        for layer, hidden in outputs.items()
    }
    rows = chunk.embedding.word_embeddings.weight if chunk.share_embeddings_and_output_weights else None
    rows = chunk.output_layer.weight if rows is None else rows
    states[num_layers + 1] = torch.stack(
        [rows[ids[slot, :length]].mean(0) if length else zeros for slot, length in enumerate(lengths)]
    )
    return states
