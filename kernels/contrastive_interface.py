"""What every form of the contrastive loss takes: the groups of the words, the checks of a call, and the similarities
that forward and backward walk through."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
"""Of the words. What is computed from bfloat16 is float32."""
LOG2_E = math.log2(math.e)
_MOST_WORDS = 1 << 21
"""float32 counts up to them, and a CUDA grid holds that many blocks of 64."""


@dataclass(frozen=True)
class WordGroups:
    """Which words of all ranks mean the same."""

    group: Tensor
    """int64 [N], the words of all ranks in rank order: the number of a word's group in [0, N), -1 for an empty slot."""
    positives: Tensor
    """float32 [N], how many other words are of the same group; 0 for an empty slot."""
    pairs: Tensor
    """float32 scalar, ordered pairs of different words of one group: the sum of `positives`."""


def word_groups(group: Tensor) -> WordGroups:
    """Counts the members of every group on the device of `group`, which the host does not wait for.

    Args:
        group: int64 [N] as in `WordGroups`.

    Raises:
        ValueError: `group` has another dtype or shape.
    """
    if group.dim() != 1 or group.dtype != torch.int64:
        raise ValueError(f"group is {group.dtype} {list(group.shape)}, expected int64 [words]")
    taken = (group >= 0).to(torch.int64)
    place = group.clamp(min=0)
    members = torch.zeros_like(group).scatter_add_(0, place, taken)
    positives = (members[place] - 1) * taken
    return WordGroups(group, positives.to(torch.float32), positives.sum().to(torch.float32))


@dataclass(frozen=True)
class Similarities:
    """The cosines between the words of this rank (anchors) and those of all ranks (columns), which nobody stores.

    L layers, n words of this rank, N of all ranks, H numbers a word.
    """

    columns: Tensor
    """[L, N, H], contiguous. The anchors are n of them."""
    inverse_norms: Tensor
    """float32 or float64 [L, N], 0 for words of norm 0 and for empty slots: no product with them is left over."""
    groups: WordGroups
    first: int
    """Column of the first anchor."""
    anchors: int
    """n."""
    temperature: float

    @property
    def own(self) -> slice:
        """The columns that are anchors."""
        return slice(self.first, self.first + self.anchors)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which type words of `dtype` are computed with."""
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
    if total > _MOST_WORDS:
        raise ValueError(f"words of all ranks are {total}, expected at most {_MOST_WORDS}")
    for name, kind, shape in (("group", torch.int64, [total]), ("positives", torch.float32, [total])):
        tensor = getattr(groups, name)
        if tensor.dtype != kind or list(tensor.shape) != shape:
            raise ValueError(
                f"groups.{name} is {tensor.dtype} {list(tensor.shape)}, expected {kind} {shape}: "
                f"{words.shape[-2]} words on each of {ranks} ranks"
            )
    for name in ("group", "positives", "pairs"):
        if getattr(groups, name).device != words.device:
            raise ValueError(f"groups.{name} lies on {getattr(groups, name).device}, expected {words.device}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature is {temperature}, expected a number above 0")
