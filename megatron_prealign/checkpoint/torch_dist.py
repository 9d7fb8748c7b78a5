"""Format `torch_dist` of Megatron-Core's `dist_checkpointing`: its files besides the tensors, and `.metadata`, the
pickle of torch's distributed checkpoint format with the location of each tensor."""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp

METADATA = ".metadata"
COMMON_FILE = "common.pt"
"""File with the plain values, saved by `torch.save`."""
BACKEND_FILE = "metadata.json"
"""File written last: Megatron-Core accepts no directory without it as a checkpoint."""
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""Content of `BACKEND_FILE`: Megatron-Core's `CheckpointingConfig("torch_dist", 1)`."""


def read_metadata(file: Path) -> dcp.Metadata:
    """Reads `.metadata`, unpickling only the classes that checkpoint metadata is built from.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is corrupt, or names another class or function.
    """
    with file.open("rb") as stream:
        try:
            metadata = _MetadataUnpickler(stream).load()
        except Exception as error:
            # A corrupt pickle raises any exception, such as a MemoryError for a random length.
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{type(error).__name__}: {reason}") from error
    if not isinstance(metadata, dcp.Metadata):
        raise ValueError(f"it contains a {type(metadata).__name__}, expected Metadata")
    return metadata


class _MetadataUnpickler(pickle._Unpickler):
    """Unpickles only the classes of checkpoint metadata: a pickle can call any function that it names.

    The unpickler written in Python: that in C allocates 16 bytes for every number up to the largest index in the file,
    which a single wrong byte can make 64 GiB. Measured for 100,000 chunks: 4.6 s instead of 2.5 s.
    """

    _MODULES = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.planner",
        # Older checkpoints of Megatron-Core name its own empty classes.
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
        # The planner's module imports much else: only its classes are allowed.
        allowed = (module, name) in self._NAMES or (module in self._MODULES and "." not in name)
        result = super().find_class(module, name) if allowed else None
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if not allowed or (module in self._MODULES and not _is_own_class(result, module, name)):
            raise pickle.UnpicklingError(f"unsupported global {module}.{name}, expected classes of checkpoint metadata")
        return result


def _is_own_class(value: Any, module: str, name: str) -> bool:
    """Whether `value` is a class defined in `module`, or one of the private classes of torch's metadata module."""
    nested = module == "torch.distributed.checkpoint.metadata" and name.startswith("_")
    return isinstance(value, type) and (value.__module__ == module or nested)


def _enum_member(owner: Any, name: str) -> Any:
    """Replaces `getattr`, with which Python 3.11.2 pickles a member of an enumeration; 3.11.7 calls the enumeration."""
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"unsupported attribute {name} of {owner}, expected a member of an enumeration")
