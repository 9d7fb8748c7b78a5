"""Registers, spills and shared memory of the kernels, with the shapes used in training. Does not require a GPU."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from megatron_prealign.errors import UserError
from megatron_prealign.kernels import (
    CodeSwitchBatch,
    CodeSwitchSettings,
    build_ngram_table,
    contrastive_launch,
    word_groups,
)
from megatron_prealign.kernels._triton import HAS_TRITON, INTERPRETED, KernelLaunch
from megatron_prealign.kernels.code_switch import plan_launches
from megatron_prealign.kernels.contrastive_interface import Similarities
from megatron_prealign.kernels.resources import CAPABILITIES, kernel_resources

EOD = 0
SETTINGS = ("usual", "everything")
"""Settings of code-switching. usual: label mode input_only. everything: label mode mix, document resets, masked
document ends and a word bitmap."""
CONTRASTIVE_SETTINGS = {
    "bfloat16 few": ("bfloat16", 256, 256),
    "bfloat16 many": ("bfloat16", 16_384, 2048),
    "float32 few": ("float32", 256, 256),
    "float32 many": ("float32", 16_384, 2048),
}
"""Settings of the contrastive loss: dtype, number of words and hidden size. Few words use smaller tiles."""


def measure_resources(capabilities: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields one row per kernel, setting and capability.

    Args:
        capabilities: Compute capabilities such as 90 for an H200; empty for `usual_capabilities`.

    Raises:
        UserError: Triton is not installed or runs in interpreter mode.
    """
    if not HAS_TRITON:
        raise UserError("compiling the kernels requires triton, which is not installed; pip install triton")
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is 1, so kernels are interpreted and not compiled; unset it")
    for setting in (*SETTINGS, *CONTRASTIVE_SETTINGS):
        plan = _plan_contrastive if setting in CONTRASTIVE_SETTINGS else _plan_code_switch
        for resources in kernel_resources(plan(setting), capabilities or usual_capabilities()):
            yield {"setting": setting, **resources._asdict()}


def usual_capabilities() -> tuple[int, ...]:
    """Compute capability of the GPU in use; without a GPU those of A100, H200 and B200."""
    if not torch.cuda.is_available():
        return CAPABILITIES
    major, minor = torch.cuda.get_device_capability()
    return (10 * major + minor,)


def _plan_contrastive(setting: str) -> list[KernelLaunch]:
    """Plans launches for words on the meta device: only shape and dtype matter."""
    dtype, count, hidden = CONTRASTIVE_SETTINGS[setting]
    with torch.device("meta"):
        columns = torch.empty((1, count, hidden), dtype=getattr(torch, dtype))
        groups, norms = word_groups(torch.arange(count)), torch.empty((1, count))
    return contrastive_launch.plan_launches(Similarities(columns, norms, groups, 0, count, temperature=0.1))


def _plan_code_switch(setting: str) -> list[KernelLaunch]:
    """Plans launches for rows of 4,096 tokens, keys of up to eight tokens and up to four candidates per key."""
    everything = setting == "everything"
    table = build_ngram_table(
        # End of document, a token that starts a word, a token that continues it.
        word_boundary=np.array([3, 5, 4], dtype=np.uint8),
        key_tokens=np.array([1, *[2] * 7], dtype=np.int32),
        key_offsets=np.array([0, 8]),
        key_language=np.zeros(1, dtype=np.int16),
        key_candidate_offsets=np.array([0, 4]),
        candidate_tokens=np.ones(4, dtype=np.int32),
        candidate_offsets=np.arange(5),
        candidate_language=np.ones(4, dtype=np.int16),
        candidate_weight=np.ones(4, dtype=np.float32),
        language_weights=[0.0, 1.0],
        forbidden_tokens=[EOD],
    )
    tokens = torch.ones((2, 4096 + 1 + 205), dtype=torch.int64)
    settings = CodeSwitchSettings(
        seed=(1 << 64) - 1,
        sequence_length=4096,
        label_mode="mix" if everything else "input_only",
        pad_id=EOD,
        eod_id=EOD,
        mask_eod=everything,
        reset_at_eod=everything,
    )
    zeros = torch.zeros(2, dtype=torch.int64)
    starts = torch.zeros(tokens.shape, dtype=torch.bool) if everything else None
    batch = CodeSwitchBatch(tokens, zeros, zeros, starts)
    return plan_launches(batch, table, torch.zeros((2, 2), dtype=torch.int64), settings)
