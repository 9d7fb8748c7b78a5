"""Exports the weights of a checkpoint, without the optimizer, to a checkpoint of only weights, in one process."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.checkpoint.commit import CONFIG, TOKENIZER, complete_weights
from megatron_prealign.checkpoint.single_process.intact import check_intact
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.single_process.weights import cast_tensor, is_stacked, is_weight
from megatron_prealign.checkpoint.single_process.writer import ShardWriter
from megatron_prealign.checkpoint.state import (
    identity_of,
    is_run,
    is_weights_checkpoint,
    layout,
    read_state,
    weights_state,
)
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import check_new_directory, new_directory
from megatron_prealign.recipe.checkpoint import Verify

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CONFIG_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class ExportResult:
    """Size and dtype of an exported checkpoint."""

    tensors: int
    """Number of tensors."""
    parameters: int
    """Number of parameters, padding rows of the vocabulary included."""
    bytes: int
    """Size of the tensors in bytes."""
    dtype: str
    """dtype of the tensors, such as bfloat16; several are joined by "and"."""


def export_weights(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str | None = None,
    verify: Verify = "checksums",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ExportResult:
    """Writes the weights of a checkpoint as a checkpoint for `pretrain --checkpoint.load`.

    Memory: the largest tensor or layer, twice if its dtype changes.

    Args:
        checkpoint: Checkpoint directory.
        output: Output directory.
        dtype: bf16 or fp32; None keeps the dtype of the weights.
        verify: How to verify the files of the checkpoint first.
        overwrite: Replace an existing checkpoint of weights.
        progress: Called with the bytes read so far and the total.

    Raises:
        UserError: the checkpoint is corrupt, or the output cannot be written.
    """
    # Before the checkpoint is read, which may take hours.
    _check_output(checkpoint, output, overwrite=overwrite)
    check_intact(checkpoint, verify)
    summary = read_state(checkpoint)
    with ShardReader(checkpoint) as reader:
        keys = [key for key in reader.tensors if is_weight(key)]
        if not keys:
            raise UserError(f"{checkpoint} contains no model weights; use another checkpoint")
        with new_directory(output, overwrite=overwrite, replaceable=is_weights_checkpoint) as working:
            with ShardWriter(working) as writer:
                result = _copy(checkpoint, reader, writer, keys, None if dtype is None else _DTYPES[dtype], progress)
                records = writer.close()
            shutil.copytree(checkpoint / TOKENIZER, working / TOKENIZER)
            complete_weights(
                working,
                weights_state(identity_of(summary), layout=layout(1, 1), source=_source(checkpoint, summary)),
                config=_config(checkpoint, dtype),
                records=records,
            )
    return result


def _check_output(checkpoint: Path, output: Path, *, overwrite: bool) -> None:
    if output.resolve() == checkpoint.resolve():
        raise UserError(f"--output {output} is the checkpoint itself; choose another path")
    check_new_directory(output, overwrite=overwrite, replaceable=is_weights_checkpoint)


def _copy(
    checkpoint: Path,
    reader: ShardReader,
    writer: ShardWriter,
    keys: list[str],
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> ExportResult:
    sizes = {key: math.prod(reader.tensors[key].shape) for key in keys}
    total = sum(sizes[key] * reader.tensors[key].dtype.itemsize for key in keys)
    done = written = 0
    dtypes = set()
    for key in keys:
        layers = reader.tensors[key].shape[0] if is_stacked(key) else None
        for layer in range(layers) if layers is not None else (None,):
            tensor = reader.read(key, layer)
            done += tensor.nbytes
            if dtype is not None:
                tensor = cast_tensor(checkpoint, key, tensor, dtype)
            writer.add(key, tensor, layer=layer, num_layers=layers)
            written += tensor.nbytes
            dtypes.add(str(tensor.dtype).removeprefix("torch."))
            if progress is not None:
                progress(done, total)
    return ExportResult(len(keys), sum(sizes.values()), written, " and ".join(sorted(dtypes)))


def _source(checkpoint: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Origin of the weights: the run, or the recorded source of a checkpoint of only weights."""
    if not is_run(summary):
        return dict(summary.get("source") or {})
    state = summary["train_state"]
    return {
        "format": "megatron-prealign",
        "checkpoint": checkpoint.name,
        "step": state.get("step"),
        "tokens": state.get("tokens"),
        "phase": summary["phase"],
        "metrics": summary.get("metrics") or {},
        "saved_at": summary.get("saved_at"),
        "versions": summary.get("versions"),
        "seq_length": summary["run"].get("seq_length"),
        "sources": summary["run"].get("sources"),
    }


def _config(checkpoint: Path, dtype: str | None) -> dict[str, Any] | None:
    """Hugging Face config.json with the dtype of the exported weights; None if the checkpoint has none."""
    try:
        config = json.loads((checkpoint / CONFIG).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{checkpoint / CONFIG} is corrupt ({error}); use another checkpoint") from error
    if dtype is not None:
        for name in {"dtype", "torch_dtype"} & config.keys():
            config[name] = _CONFIG_DTYPES[dtype]
    return dict(config)
