"""The sharded state of a run in the form that `dist_checkpointing` saves and loads."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedObject

from megatron_prealign.checkpoint.state import layout
from megatron_prealign.runtime import random_state
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import unwrap


def layout_of(runtime: Runtime) -> dict[str, Any]:
    """How a run is laid out, as plain values for `state.json`."""
    return layout(
        runtime.parallel.tensor_model_parallel_size,
        runtime.parallel.pipeline_model_parallel_size,
        virtual=runtime.parallel.model_chunks,
        data=runtime.data_size,
        device=runtime.device.type,
    )


def random_state_of(runtime: Runtime) -> ShardedObject:
    """This rank's random states; one object per rank, since dropout differs between ranks."""
    shape = (runtime.groups.pp.size(), runtime.groups.tp.size(), runtime.data_size)
    rank = (runtime.pipeline_rank, runtime.tensor_rank, runtime.data_rank)
    return ShardedObject("random_state", random_state.capture(), shape, rank, replica_id=0)


def model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """The weights of this rank's chunks.

    Without `_extra_state`, which Transformer Engine has for number formats that no recipe can ask for: checkpoints of
    either layer implementation load into the other.
    """
    return {
        f"model{index}": {
            name: value for name, value in unwrap(chunk).sharded_state_dict().items() if not _is_extra(name)
        }
        for index, chunk in enumerate(chunks)
    }


def load_model_state(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Copies what was loaded for `model_state` into the chunks.

    Raises:
        ValueError: a tensor is missing or too many.
    """
    for index, chunk in enumerate(chunks):
        different = unwrap(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        names = [name for name in (*different.missing_keys, *different.unexpected_keys) if not _is_extra(name)]
        if names:
            raise ValueError(f"the model and its checkpoint differ in {', '.join(names)}")


def _is_extra(name: str) -> bool:
    return name.endswith("_extra_state")


class AuxiliaryState(Protocol):
    """State of a run beside its model and optimizer, in the form of `dist_checkpointing`."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, content: dict[str, Any]) -> None: ...
