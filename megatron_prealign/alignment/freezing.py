"""Blocks that the alignment phase freezes (AlignFreeze)."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel

from megatron_prealign.recipe import Recipe


def frozen_parameters(recipe: Recipe, models: Sequence[GPTModel]) -> Iterator[torch.nn.Parameter]:
    """Parameters of the frozen half of the blocks, lower or upper, that are on this rank. With an odd number of blocks
    the middle one belongs to the upper half. Embeddings and the final norm are always trained."""
    freeze = "none" if recipe.alignment is None else recipe.alignment.freeze
    if freeze == "none":
        return
    middle = recipe.model.num_layers // 2
    for model in models:
        for layer in model.decoder.layers:
            if (layer.layer_number <= middle) == (freeze == "lower"):
                yield from layer.parameters()
