"""Model weights among the tensors of a checkpoint: their names, and checks of their values."""

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    import torch

_MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYERS = "decoder.layers."


def is_weight(key: str) -> bool:
    """Whether a tensor of a checkpoint belongs to the model, not to the optimizer or projection heads."""
    return key.startswith(_MODEL_PREFIXES)


def is_stacked(key: str) -> bool:
    """Whether dimension 0 of the tensor is the layer."""
    return key.startswith(_LAYERS) and not key[len(_LAYERS) :].split(".")[0].isdigit()


def is_vocabulary(key: str) -> bool:
    """Whether dimension 0 of the tensor is the token id, padding of the vocabulary included."""
    return key in _VOCABULARY


def is_finite(tensor: "torch.Tensor") -> bool:
    """Whether no value is NaN or Inf. One pass, without extra memory."""
    import torch

    if not tensor.numel():
        return True
    # aminmax propagates NaN.
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_finite(where: Path, name: str, tensor: "torch.Tensor", advice: str) -> None:
    """Checks that all values of a tensor are finite.

    Args:
        where: File or directory of the tensor.
        name: Name of the tensor.
        advice: End of the message: what to do.

    Raises:
        UserError: values are NaN or Inf.
    """
    import torch

    if not is_finite(tensor):
        count = int((~torch.isfinite(tensor)).sum())
        raise UserError(f"{where}: {count:,} of {tensor.numel():,} values of {name} are NaN or Inf{advice}")


def cast_tensor(where: Path, name: str, tensor: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
    """Casts a tensor to `dtype`; returns the tensor itself if it has that dtype.

    Args:
        where: File or directory of the tensor.

    Raises:
        UserError: finite values overflow in `dtype`.
    """
    import torch

    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if not is_finite(result) and is_finite(tensor):
        advice = "use another model" if dtype is torch.float32 else "omit --dtype"
        raise UserError(f"{where}: values of {name} are too large for {str(dtype).removeprefix('torch.')}; {advice}")
    return result
