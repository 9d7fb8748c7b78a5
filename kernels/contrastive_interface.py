"""Inputs of all implementations of the contrastive loss: the groups of the words, argument checks, and the similarities
that forward and backward iterate over."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Supported dtypes of the words. bfloat16 is computed in float32."""
LOG2_E = math.log2(math.e)
_MAX_WORDS = 1 << 21
"""Maximum number of words: counts stay exact in float32, and blocks of 64 words fit a CUDA grid."""


@dataclass(frozen=True)
class WordGroups:
    """Groups of words with the same meaning, over all ranks."""

    group: Tensor
    """int64 [N], group of each word of all ranks in rank order, in [0, N); -1 for an empty slot."""
    positives: Tensor
    """float32 [N], number of other words in the same group; 0 for an empty slot."""
    pairs: Tensor
    """float32 scalar, number of ordered pairs of different words of a group: the sum of `positives`."""


def word_groups(group: Tensor) -> WordGroups:
    """Counts the members of every group on the device of `group`, without waiting for the device.

    Args:
        group: int64 [N] as in `WordGroups`.

    Raises:
        ValueError: `group` has another dtype or shape.
    """
    if group.dim() != 1 or group.dtype != torch.int64:
        raise ValueError(f"group is {group.dtype} {list(group.shape)}, expected int64 [words]")
    valid = (group >= 0).to(torch.int64)
    index = group.clamp(min=0)
    members = torch.zeros_like(group).scatter_add_(0, index, valid)
    positives = (members[index] - 1) * valid
    return WordGroups(group, positives.to(torch.float32), positives.sum().to(torch.float32))


@dataclass(frozen=True)
class Similarities:
    """Cosines between the words of this rank (anchors) and those of all ranks (columns), which are never materialised.

    L layers, n words of this rank, N of all ranks, H elements per word.
    """

    columns: Tensor
    """[L, N, H], contiguous; includes the n anchors."""
    inverse_norms: Tensor
    """float32 or float64 [L, N]; 0 for words of norm 0 and for empty slots, which makes products with them 0."""
    groups: WordGroups
    first: int
    """Column of the first anchor."""
    anchors: int
    """n, the number of anchors."""
    temperature: float

    @property
    def own(self) -> slice:
        """The columns that are anchors."""
        return slice(self.first, self.first + self.anchors)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which words of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def inverse_norms(columns: Tensor, group: Tensor) -> Tensor:
    """[L, N] for columns [L, N, H], see `Similarities`."""
    norms = torch.linalg.vector_norm(columns, dim=-1, dtype=compute_dtype(columns.dtype))
    return torch.where((norms > 0) & (group >= 0), 1 / norms, 0)


def check_call(words: Tensor, groups: WordGroups, temperature: float, ranks: int) -> None:
    """Checks the arguments of `contrastive_loss` without reading from the device.

    Raises:
        ValueError: a shape, dtype, device or the temperature is wrong.
    """
    if words.dim() not in (2, 3) or words.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"words is {words.dtype} {list(words.shape)}, "
            f"expected [words, hidden] or [layers, words, hidden] of {names}"
        )
    total = words.shape[-2] * ranks
    if total > _MAX_WORDS:
        raise ValueError(f"words has {total} words over all ranks, expected at most {_MAX_WORDS}")
    for name, dtype, shape in (("group", torch.int64, [total]), ("positives", torch.float32, [total])):
        tensor = getattr(groups, name)
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            raise ValueError(
                f"groups.{name} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {shape}: "
                f"{words.shape[-2]} words on each of {ranks} ranks"
            )
    for name in ("group", "positives", "pairs"):
        if getattr(groups, name).device != words.device:
            raise ValueError(f"groups.{name} is on {getattr(groups, name).device}, expected {words.device}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
