"""Which blocks the alignment phase leaves as they are (AlignFreeze)."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt import GPTModel

from megatron_prealign.recipe import Recipe


def frozen_parameters(recipe: Recipe, models: Sequence[GPTModel]) -> Iterator[torch.nn.Parameter]:
    """Parameters of the lower or upper half of the blocks, as far as this rank holds them; of an odd number of blocks
    the middle one belongs to the upper half. Embeddings and the final norm are always trained."""
    freeze = "none" if recipe.alignment is None else recipe.alignment.freeze
    if freeze == "none":
        return
    middle = recipe.model.num_layers // 2
    for model in models:
        for layer in model.decoder.layers:
            if (layer.layer_number <= middle) == (freeze == "lower"):
                yield from layer.parameters()
