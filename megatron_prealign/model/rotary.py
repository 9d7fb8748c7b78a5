"""Rotary frequencies that are stretched for longer contexts.

Megatron-Core has Llama 3's way with its published constants built in; models differ in them.
"""

import math

import torch
from megatron.core.models.gpt import GPTModel

from megatron_prealign.recipe import RopeScaling


def scale_rotary(chunk: GPTModel, scaling: RopeScaling) -> None:
    """Replaces the frequencies of a model chunk by the stretched ones."""
    chunk.rotary_pos_emb.inv_freq = scaled_frequencies(chunk.rotary_pos_emb.inv_freq, scaling)


def scaled_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Stretches rotary frequencies.

    Args:
        frequencies: float32 `[channels / 2]`, in radians a token.

    Returns:
        The same shape. `linear`: divided by the factor. `llama3`: divided for wavelengths that the first training has
        not seen whole, kept for short ones, and in between a mean weighted by how often the wave fits into the first
        context.
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor
