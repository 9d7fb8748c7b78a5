"""Sharded state dicts of a run, for `dist_checkpointing`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedObject

from megatron_prealign.checkpoint.state import layout
from megatron_prealign.runtime import random_state
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import unwrap


def layout_of(runtime: Runtime) -> dict[str, Any]:
    """Parallel layout of a run, as plain values for `state.json`."""
    return layout(
        runtime.parallel.tensor_model_parallel_size,
        runtime.parallel.pipeline_model_parallel_size,
        virtual=runtime.parallel.model_chunks,
        data=runtime.data_size,
        device=runtime.device.type,
    )


def random_state_of(runtime: Runtime) -> ShardedObject:
    """Random states of this rank; one object per rank, since dropout differs between ranks."""
    shape = (runtime.groups.pp.size(), runtime.groups.tp.size(), runtime.data_size)
    rank = (runtime.pipeline_rank, runtime.tensor_rank, runtime.data_rank)
    return ShardedObject("random_state", random_state.capture(), shape, rank, replica_id=0)


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Sharded weights of this rank's model chunks.

    Without `_extra_state`, which Transformer Engine has for dtypes that no recipe can select, so checkpoints of either
    layer implementation load into the other.
    """
    return {
        f"model{index}": {
            name: value for name, value in unwrap(chunk).sharded_state_dict().items() if not _is_extra(name)
        }
        for index, chunk in enumerate(chunks)
    }


def load_model_state(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Copies the loaded `model_state` into the chunks.

    Raises:
        ValueError: a tensor is missing or unexpected.
    """
    for index, chunk in enumerate(chunks):
        result = unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        names = [name for name in (*result.missing_keys, *result.unexpected_keys) if not _is_extra(name)]
        if names:
            raise ValueError(f"tensors {', '.join(names)} are missing or unexpected")


def _is_extra(name: str) -> bool:
    return name.endswith("_extra_state")


class AuxiliaryState(Protocol):
    """State of a run besides its model and optimizer, as a sharded state dict."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, content: dict[str, Any]) -> None: ...
