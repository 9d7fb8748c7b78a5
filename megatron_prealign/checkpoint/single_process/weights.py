"""The weights among a checkpoint's tensors: their names, and checks of their values."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    import torch

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYERS = "decoder.layers."


def is_weight(key: str) -> bool:
    """Whether a tensor of a checkpoint is one of the model, and not the optimizer's or one of projection heads."""
    return key.startswith(_MODEL_PREFIXES)


def is_stacked(key: str) -> bool:
    """Whether dimension 0 of the tensor counts layers."""
    return key.startswith(_LAYERS) and not key[len(_LAYERS) :].split(".")[0].isdigit()


def is_vocabulary(key: str) -> bool:
    """Whether dimension 0 of the tensor counts token ids, those that only pad the vocabulary included."""
    return key in _VOCABULARY


def is_finite(tensor: "torch.Tensor") -> bool:
    """Whether no number is NaN or infinite. One pass without memory of its own."""
    import torch

    if not tensor.numel():
        return True
    # NaN comes through as NaN.
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_numbers(where: Path, name: str, tensor: "torch.Tensor", advice: str) -> None:
    """Refuses weights that compute nothing.

    Args:
        where: File or directory that holds it.
        name: Of the tensor.
        advice: What to do, for the user.

    Raises:
        UserError: numbers are NaN or infinite.
    """
    import torch

    if not is_finite(tensor):
        broken = int((~torch.isfinite(tensor)).sum())
        raise UserError(f"{where}: {broken:,} of the {tensor.numel():,} numbers of {name} are NaN or infinite{advice}")


def converted(where: Path, name: str, tensor: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """The tensor in another type; itself if it has that type.

    Args:
        where: File or directory that holds it.

    Raises:
        UserError: finite numbers of it are too large for that type.
    """
    import torch

    if tensor.dtype == dtype:
        return tensor
    changed = tensor.to(dtype)
    if not is_finite(changed) and is_finite(tensor):
        advice = "use another model" if dtype is torch.float32 else "leave --dtype out"
        raise UserError(
            f"{where}: {name} has numbers that are too large for {str(dtype).removeprefix('torch.')}; {advice}"
        )
    return changed
