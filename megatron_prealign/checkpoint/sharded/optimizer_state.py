"""Sharded state of the optimizer: each rank saves its own part, without a gather.

Megatron-Core 0.16.1 gathers the moments and master weights of a stage on its first data-parallel rank to save them in a
form that loads at any data-parallel size: that takes ten times as long as copying them, and training waits. A
data-parallel rank has a range of each parameter's elements, flattened. Such a range consists of a few boxes of the
parameter, and the format allows boxes of any size, so each rank saves the boxes of its own ranges. The checkpoint has
the same tensors under the same names.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer, distrib_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

# A form that loads at any other TP, PP and DP size (Megatron-Core's default form loads at the same DP only). The second
# setting concerns only loading: the first data-parallel rank reads for the others.
OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...], int]
"""Offsets and sizes of a box, and the index of its first element in the flat tensor."""


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """Sharded state dict of `optimizer` for saving; its tensors alias the optimizer's and change with its next step.

    Args:
        model: Sharded state dict of the model it trains.
    """
    with _without_gather():
        return dict(optimizer.sharded_state_dict(model, metadata=OPTIMIZER_METADATA))


@contextmanager
def _without_gather() -> Iterator[None]:
    """Replaces Megatron-Core's gather of the optimizer's state with `_parameter_state`."""
    name = "sharded_param_state_fully_reshardable"
    real, collector = getattr(DistributedOptimizer, name), distrib_optimizer.gc
    setattr(DistributedOptimizer, name, _parameter_state)
    # Megatron-Core collects garbage after the gather, a third of a second in a small run; nothing is gathered here.
    distrib_optimizer.gc = SimpleNamespace(collect=lambda: None)
    try:
        yield
    finally:
        setattr(DistributedOptimizer, name, real)
        distrib_optimizer.gc = collector


def _parameter_state(
    optimizer: DistributedOptimizer, model: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> list[ShardedTensor]:
    """Replaces `DistributedOptimizer.sharded_param_state_fully_reshardable` while a checkpoint is saved."""
    sharded, _ = extract_sharded_tensors_and_factories(model)
    by_parameter = {each.data: each for each in nested_values(sharded)}
    return [
        shard
        for ranges_by_type in optimizer.gbuf_ranges
        for buckets in ranges_by_type.values()
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
        for shard in _local_shards(optimizer, parameter, by_parameter[parameter], ranges["param"])
    ]


def _local_shards(
    optimizer: DistributedOptimizer, parameter: torch.Tensor, sharded: Any, own: Any
) -> Iterator[ShardedTensor]:
    """This rank's part of one parameter's state: its elements from `own.start` to `own.end`, in flat order."""
    values = optimizer._get_main_param_and_optimizer_states(parameter)
    # Other ranks have this parameter's weights too, but only this rank has the state of these elements.
    replica_id = (*sharded.replica_id[:-1], 0)
    for key in _STATE_KEYS:
        flat = values[key].detach().view(-1)
        for full in _full_tensors(sharded, f"optimizer.state.{key}.{sharded.key}", flat.dtype, replica_id):
            begin = full.data.storage_offset()
            start, end = max(own.start, begin), min(own.end, begin + full.data.numel())
            if start < end:
                yield from _as_boxes(full, flat[start - own.start : end - own.start], start - begin)


def _full_tensors(sharded: Any, key: str, dtype: torch.dtype, replica_id: tuple[int, ...]) -> list[ShardedTensor]:
    """The tensors that a parameter is saved as, on the meta device; their storage offsets are their positions in the
    parameter. A gated MLP's first matrix is saved as two."""
    data = torch.empty(sharded.data.shape, dtype=dtype, device="meta")
    if isinstance(sharded, ShardedTensorFactory):
        built = replace(sharded, key=key, data=data, replica_id=replica_id).build()
        tensors = list(nested_values(built))
    else:
        tensors = [replace(sharded, key=key, data=data, dtype=dtype, replica_id=replica_id)]
    assert all(tensor.data.is_contiguous() for tensor in tensors), key
    return tensors


def _as_boxes(full: ShardedTensor, flat: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """Splits `flat`, the elements of `full` from index `start` on, into boxes."""
    # The prepended axes are the index of the layer.
    before = full.prepend_axis_num
    for offsets, sizes, at in boxes(full.local_shape, start, start + flat.numel()):
        shape = (*(1,) * before, *sizes)
        yield ShardedTensor(
            key=full.key,
            data=flat[at - start : at - start + math.prod(sizes)].view(shape),
            dtype=flat.dtype,
            local_shape=shape,
            global_shape=full.global_shape,
            global_offset=tuple(
                base + offset for base, offset in zip(full.global_offset, (*(0,) * before, *offsets), strict=True)
            ),
            axis_fragmentations=None,
            replica_id=full.replica_id,
            allow_shape_mismatch=full.allow_shape_mismatch,
        )


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Splits a range of a tensor's elements into boxes, in ascending order: at most 2 x dimensions - 1.

    Args:
        shape: Shape of the tensor.
        start, end: Non-empty range in the flat tensor.
    """
    if len(shape) == 1:
        yield (start,), (end - start,), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:
        # The range is within one row.
        yield from _in_row(shape, last, start, end)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    if last * row < end:
        yield from _in_row(shape, last, last * row, end)


def _in_row(shape: Sequence[int], index: int, start: int, end: int) -> Iterator[Box]:
    begin = index * math.prod(shape[1:])
    for offsets, sizes, at in boxes(shape[1:], start - begin, end - begin):
        yield (index, *offsets), (1, *sizes), at + begin
