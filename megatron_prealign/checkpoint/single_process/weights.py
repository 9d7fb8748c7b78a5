"""What weights of a model are in a checkpoint folder, and the folders that hold nothing else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megatron_prealign.checkpoint.folder import STATE
from megatron_prealign.checkpoint.manifest import FileRecord, write_manifest
from megatron_prealign.errors import UserError

if TYPE_CHECKING:
    import torch

MODEL_FILE = "model.yaml"
TOKENIZER = "tokenizer"
CONFIG = "huggingface/config.json"
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


def is_weights_folder(folder: Path) -> bool:
    """Whether there is a checkpoint of weights alone, which can be made again. A run's is never taken for one."""
    try:
        summary = json.loads((folder / STATE).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and summary.get("kind") == "weights"


def complete_weights(
    folder: Path,
    *,
    vocab_size: int,
    padded_vocab_size: int,
    tokenizer_fingerprint: str,
    model: Mapping[str, Any],
    layout: Mapping[str, Any],
    source: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    records: Mapping[str, FileRecord],
) -> None:
    """Writes what a checkpoint has beside its tensors and its tokenizer, the manifest last.

    Args:
        folder: With the tensors and the folder `tokenizer`.
        model: The recipe's section `model`, as plain values.
        layout: In how many parts the tensors were written.
        source: Where they come from, any facts.
        config: config.json of the same model for Hugging Face; None where that cannot be said.
        records: Of the files with the tensors.

    Raises:
        OSError: the disk does not take it.
    """
    summary = {
        "kind": "weights",
        "vocab_size": vocab_size,
        "padded_vocab_size": padded_vocab_size,
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "model": dict(model),
        "layout": dict(layout),
        "source": dict(source),
    }
    text = yaml.safe_dump({"model": dict(model)}, sort_keys=False, allow_unicode=True)
    (folder / MODEL_FILE).write_text(text, encoding="utf-8")
    if config is not None:
        (folder / CONFIG).parent.mkdir(exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / STATE).write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
    write_manifest(folder, records)


def written_layout(tensor_parallel: int, pipeline_parallel: int) -> dict[str, Any]:
    """`layout` of a checkpoint that one process wrote in so many parts."""
    return {
        "tensor_model_parallel_size": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "virtual_pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "device": "cpu",
    }


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
        where: File or folder that holds it.
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
        where: File or folder that holds it.

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
