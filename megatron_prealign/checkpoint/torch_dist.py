"""The format `torch_dist` of Megatron-Core's `dist_checkpointing`: its files next to the tensors, and `.metadata`, the
pickle in which torch's distributed format says where the tensors of a checkpoint lie."""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

METADATA = ".metadata"
COMMON_FILE = "common.pt"
"""Plain values, saved by `torch.save`."""
BACKEND_FILE = "metadata.json"
"""Written last: Megatron-Core takes no directory without it for a checkpoint."""
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of `BACKEND_FILE`: Megatron-Core's `CheckpointingConfig("torch_dist", 1)`."""


def read_metadata(file: Path) -> dcp.Metadata:
    """The metadata of a checkpoint. Nothing in the file is called but what a checkpoint's metadata is made of.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or names something else.
    """
    with file.open("rb") as stream:
        try:
            metadata = _MetadataUnpickler(stream).load()
        except Exception as error:
            # A damaged pickle raises whatever its bytes happen to ask for, a MemoryError for a length that is none.
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{type(error).__name__}: {reason}") from error
    if not isinstance(metadata, dcp.Metadata):
        raise ValueError(f"it holds a {type(metadata).__name__}")
    return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles nothing but what a checkpoint's `.metadata` is made of: a pickle can name any function to be called."""

    _MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.planner",
        # Older checkpoints of Megatron-Core name its own, empty, classes.
        "megatron.core.dist_checkpointing.strategies.torch",
    )
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch", "device"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("builtins", "getattr"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout):
            return getattr(torch, name)
        # Of the planner's module, which imports much else, the classes alone.
        allowed = (module, name) in self._NAMES or (module in self._MODULES and "." not in name)
        found = super().find_class(module, name) if allowed else None
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if not allowed or (module in self._MODULES and not _is_own_class(found, module, name)):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint holds")
        return found


def _is_own_class(found: Any, module: str, name: str) -> bool:
    nested = module == "torch.distributed.checkpoint.metadata" and name.startswith("_")
    return isinstance(found, type) and (found.__module__ == module or nested)


def _enum_member(owner: Any, name: str) -> Any:
    """Stands in for `getattr`, by which some versions of Python (3.11.2) pickle a member of an enumeration; others
    (3.11.7) call the enumeration."""
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"it asks for {name} of {owner}, which no checkpoint does")
