"""Scales rotary frequencies for longer contexts.

Megatron-Core implements Llama 3's scaling with fixed constants; models differ in them.
"""

import math

import torch
from megatron.core.models.gpt import GPTModel

from megatron_prealign.recipe import RopeScaling


def scale_rotary(chunk: GPTModel, scaling: RopeScaling) -> None:
    """Replaces the frequencies of a model chunk by the scaled ones."""
    chunk.rotary_pos_emb.inv_freq = scaled_frequencies(chunk.rotary_pos_emb.inv_freq, scaling)


def scaled_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Scales rotary frequencies.

    Args:
        frequencies: float32 `[head_dim / 2]`, in radians per token.

    Returns:
        Frequencies of the same shape. `linear`: divided by the factor. `llama3`: divided by the factor for long
        wavelengths, unchanged for short ones, and in between interpolated by how many wavelengths fit into the original
        context.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    cycles = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = ((cycles - low) / (high - low)).clamp(0.0, 1.0)
    return smooth * frequencies + (1 - smooth) * frequencies / scaling.factor
