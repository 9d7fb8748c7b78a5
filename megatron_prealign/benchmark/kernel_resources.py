"""Registers, spills and shared memory of the kernels in the shape that training launches; needs no GPU."""

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
"""Of code-switching. usual: label mode input_only. everything: mode mix, document resets, masked document ends and a
word bitmap."""
CONTRASTIVE_SETTINGS = {
    "bfloat16 few": ("bfloat16", 256, 256),
    "bfloat16 many": ("bfloat16", 16_384, 2048),
    "float32 few": ("float32", 256, 256),
    "float32 many": ("float32", 16_384, 2048),
}
"""Of the contrastive loss: type, words and numbers a word. Few words are launched in smaller tiles."""


def measure_resources(capabilities: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One row a kernel, setting and capability.

    Args:
        capabilities: for example 90 for an H200; none for the GPU's own, or for the usual ones without a GPU.

    Raises:
        UserError: Triton is missing or runs as an interpreter.
    """
    if not HAS_TRITON:
        raise UserError("triton is not installed, which compiles the kernels; pip install triton")
    if INTERPRETED:
        raise UserError("TRITON_INTERPRET is 1, which leaves nothing to compile; unset it")
    for setting in (*SETTINGS, *CONTRASTIVE_SETTINGS):
        plan = _plan_contrastive if setting in CONTRASTIVE_SETTINGS else _plan_code_switch
        for found in kernel_resources(plan(setting), capabilities or usual_capabilities()):
            yield {"setting": setting, **found._asdict()}


def usual_capabilities() -> tuple[int, ...]:
    """The capability of the GPU in use, without one those of the A100, H200 and B200."""
    if not torch.cuda.is_available():
        return CAPABILITIES
    major, minor = torch.cuda.get_device_capability()
    return (10 * major + minor,)


def _plan_contrastive(setting: str) -> list[KernelLaunch]:
    """Words of no content: only their shape and type count."""
    dtype, count, hidden = CONTRASTIVE_SETTINGS[setting]
    with torch.device("meta"):
        columns = torch.empty((1, count, hidden), dtype=getattr(torch, dtype))
        groups, norms = word_groups(torch.arange(count)), torch.empty((1, count))
    return contrastive_launch.plan_launches(Similarities(columns, norms, groups, 0, count, temperature=0.1))


def _plan_code_switch(setting: str) -> list[KernelLaunch]:
    """Rows of 4,096 tokens, keys of up to eight tokens, up to four candidates a key."""
    everything = setting == "everything"
    table = build_ngram_table(
        # the end of the document, a token that starts a word, one that goes on with it
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
