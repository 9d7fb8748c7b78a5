"""Reads sharded state that `save` wrote, in any layout."""

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
    """Checks that the files of a checkpoint are there, readable and as long as they were written. Needs no other rank.

    `load_sharded` would find out only between collectives, where an error on one rank leaves the others waiting.

    Args:
        metadata: What `.metadata` of the checkpoint holds.

    Raises:
        Exception: what reading them raises, of many kinds; a ValueError that names the file that is too short.
    """
    load_common(directory)
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for file, end in sorted(ends.items()):
        size = (directory / file).stat().st_size
        if size < end:
            raise ValueError(f"{file} has {size} bytes, expected {end}")


def tensor_shapes(state: Any) -> dict[str, tuple[int, ...] | None]:
    """Key -> whole shape of the sharded tensors in `state`; None where the checkpoint's may be another, as that of a
    vocabulary with other padding."""
    shapes: dict[str, tuple[int, ...] | None] = {}
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor):
            shapes[tensor.key] = None if tensor.allow_shape_mismatch else tuple(tensor.global_shape)
        elif isinstance(tensor, ShardedTensorFactory):
            shapes.update(tensor_shapes(tensor.build()))
    return shapes


def saved_shapes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Key -> whole shape of every tensor of a checkpoint."""
    entries = metadata.state_dict_metadata
    return {key: tuple(entry.size) for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}


@contextmanager
def read_errors_as_user_errors(directory: Path, advice: str) -> Iterator[None]:
    """Turns whatever a damaged checkpoint raises into one line that names it and ends with `advice`."""
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, CheckpointException) as error:
        # torch's own exception is no `Exception`, and its text is a traceback of every rank.
        cause: BaseException = error
        if isinstance(error, CheckpointException) and error.failures:
            cause = error.failures[min(error.failures)][0]
        first_line = (str(cause).strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"{directory} cannot be read ({type(cause).__name__}: {first_line}); it is damaged or incomplete, {advice}"
        ) from error


def load_sharded(state: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Fills `state` (built for this run's layout) from a directory written by `save_sharded` in any layout.

    Takes part: all ranks. Call `check_files` before it.
    """
    return dist_checkpointing.load(state, str(directory))


def load_common(directory: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, without its tensors. Needs no other rank.

    Raises:
        FileNotFoundError: they are not there.
        UnpicklingError: they are no plain values, but name code to be run.
    """
    if not (directory / COMMON_FILE).is_file():
        raise FileNotFoundError(f"{COMMON_FILE} is missing")
    # Megatron-Core's own reader runs whatever the file names.
    content: dict[str, Any] = torch.load(directory / COMMON_FILE, map_location="cpu", weights_only=True)
    return content
