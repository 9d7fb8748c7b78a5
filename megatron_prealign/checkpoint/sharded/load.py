"""Loads sharded state written by `save`, in any layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_prealign.checkpoint.torch_dist import COMMON_FILE
from megatron_prealign.errors import UserError


def check_files(directory: Path, metadata: Metadata) -> None:
    """Checks that the files of a checkpoint exist, are readable and have their expected lengths. Not collective.

    `load_sharded` would fail between collectives, where an error on one rank leaves the others waiting.

    Args:
        metadata: Content of `.metadata` of the checkpoint.

    Raises:
        Exception: any error from reading the files; a ValueError names a file that is too short.
    """
    load_common(directory)
    ends: dict[str, int] = {}
    for chunk in metadata.storage_data.values():
        ends[chunk.relative_path] = max(ends.get(chunk.relative_path, 0), chunk.offset + chunk.length)
    for file, end in sorted(ends.items()):
        size = (directory / file).stat().st_size
        if size < end:
            raise ValueError(f"{file} has {size} bytes, expected {end}")


def tensor_shapes(state: Any) -> dict[str, tuple[int, ...] | None]:
    """Key -> global shape of each sharded tensor in `state`; None if the checkpoint may have another shape, as for a
    vocabulary with different padding."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            shapes[tensor.key] = None if tensor.allow_shape_mismatch else tuple(tensor.global_shape)
        elif isinstance(tensor, ShardedTensorFactory):
            shapes.update(tensor_shapes(tensor.build()))
    return shapes


def saved_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of every tensor of a checkpoint."""
    entries = metadata.state_dict_metadata
    return {key: tuple(entry.size) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


@contextmanager
def read_errors_as_user_errors(directory: Path, advice: str) -> Iterator[None]:
    """Turns any error from a corrupt checkpoint into a one-line `UserError` with its path, ending in `advice`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, CheckpointException) as error:
        # CheckpointException is not an `Exception`, and its text is a traceback of every rank.
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = error.failures[min(error.failures)][0]
        first_line = (str(cause).strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"cannot read {directory}: {type(cause).__name__}: {first_line}; it is corrupt or incomplete, {advice}"
        ) from error


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Loads a directory written by `save` in any layout into `state`, which is built for this run's layout.

    Collective: call on all ranks, after `check_files`.
    """
    return dist_checkpointing.load(state, str(directory))


def load_common(directory: Path) -> dict[str, Any]:
    """Loads the plain values of a checkpoint, without its tensors. Not collective.

    Raises:
        FileNotFoundError: the file is missing.
        UnpicklingError: the file contains something other than plain values, such as code to run.
    """
    if not (directory / COMMON_FILE).is_file():
        raise FileNotFoundError(f"{COMMON_FILE} is missing")
    # Megatron-Core's own reader unpickles without `weights_only`, which runs any code in the file.
    content: dict[str, Any] = torch.load(directory / COMMON_FILE, map_location="cpu", weights_only=True)
    return content
