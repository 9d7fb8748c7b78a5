"""The optimizer's state for a checkpoint: each rank gives what it holds, and nothing is gathered.

Megatron-Core 0.16.1 brings the moments and master weights of a stage to its first data-parallel rank before it saves
them in a form that loads at any data-parallel size: that takes ten times as long as copying them, and training waits.
A data-parallel rank holds a range of each parameter's elements, laid out flat. Such a range is a few boxes of the
parameter, and the format takes boxes of any size, so here each rank saves the boxes of its own ranges. What is read is
the same tensors by the same names.
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
# is about loading alone: the first data-parallel rank reads for the others.
OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
_STATE_KEYS = ("param", "exp_avg", "exp_avg_sq")

Box = tuple[tuple[int, ...], tuple[int, ...], int]
"""Offsets and sizes of a box, and where its first element lies in the flat tensor."""


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """The sharded state of `optimizer` to save; its tensors are the optimizer's own and change with its next step.

    Args:
        model: the sharded state of the model it trains.
    """
    with _own_parts_alone():
        return dict(optimizer.sharded_state_dict(model, metadata=OPTIMIZER_METADATA))


@contextmanager
def _own_parts_alone() -> Iterator[None]:
    name = "sharded_param_state_fully_reshardable"
    real, collector = getattr(DistributedOptimizer, name), distrib_optimizer.gc
    setattr(DistributedOptimizer, name, _parameter_state)
    # It collects garbage after gathering, a third of a second in a small run; here nothing was gathered.
    distrib_optimizer.gc = SimpleNamespace(collect=lambda: None)
    try:
        yield
    finally:
        setattr(DistributedOptimizer, name, real)
        distrib_optimizer.gc = collector


def _parameter_state(
    optimizer: DistributedOptimizer, model: dict[str, Any], is_loading: bool = False, metadata: Any = None
) -> list[ShardedTensor]:
    """Stands in for `DistributedOptimizer.sharded_param_state_fully_reshardable` while a checkpoint is saved."""
    sharded, _ = extract_sharded_tensors_and_factories(model)
    by_parameter = {each.data: each for each in nested_values(sharded)}
    return [
        part
        for ranges_by_type in optimizer.gbuf_ranges
        for buckets in ranges_by_type.values()
        for bucket in buckets
        for parameter, ranges in bucket["param_map"].items()
        for part in _parts(optimizer, parameter, by_parameter[parameter], ranges["param"])
    ]


def _parts(optimizer: DistributedOptimizer, parameter: torch.Tensor, sharded: Any, own: Any) -> Iterator[ShardedTensor]:
    """What this rank holds of one parameter: its elements from `own.start` to `own.end`, in the flat order."""
    values = optimizer._get_main_param_and_optimizer_states(parameter)
    # Other ranks have this parameter's weights too, but of these elements' state there is this one alone.
    replica_id = (*sharded.replica_id[:-1], 0)
    for key in _STATE_KEYS:
        flat = values[key].detach().view(-1)
        for whole in _whole(sharded, f"optimizer.state.{key}.{sharded.key}", flat.dtype, replica_id):
            begin = whole.data.storage_offset()
            start, end = max(own.start, begin), min(own.end, begin + whole.data.numel())
            if start < end:
                yield from _boxed(whole, flat[start - own.start : end - own.start], start - begin)


def _whole(sharded: Any, key: str, dtype: torch.dtype, replica_id: tuple[int, ...]) -> list[ShardedTensor]:
    """The tensors that a parameter is saved as, without memory; where they lie in the parameter is their storage
    offset. A gated MLP's first matrix is two."""
    data = torch.empty(sharded.data.shape, dtype=dtype, device="meta")
    if isinstance(sharded, ShardedTensorFactory):
        built = replace(sharded, key=key, data=data, replica_id=replica_id).build()
        parts = list(nested_values(built))
    else:
        parts = [replace(sharded, key=key, data=data, dtype=dtype, replica_id=replica_id)]
    assert all(part.data.is_contiguous() for part in parts), key
    return parts


def _boxed(whole: ShardedTensor, flat: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """`flat`, the elements of `whole` from `start` on, as boxes."""
    # The axes before the parameter's own, which number its layer.
    before = whole.prepend_axis_num
    for offsets, sizes, at in boxes(whole.local_shape, start, start + flat.numel()):
        shape = (*(1,) * before, *sizes)
        yield ShardedTensor(
            key=whole.key,
            data=flat[at - start : at - start + math.prod(sizes)].view(shape),
            dtype=flat.dtype,
            local_shape=shape,
            global_shape=whole.global_shape,
            global_offset=tuple(
                here + there for here, there in zip(whole.global_offset, (*(0,) * before, *offsets), strict=True)
            ),
            axis_fragmentations=None,
            replica_id=whole.replica_id,
            allow_shape_mismatch=whole.allow_shape_mismatch,
        )


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """The boxes that a range of the elements of a tensor consists of, in their order: at most 2 x dimensions - 1.

    Args:
        shape: of the tensor.
        start, end: the range in the flat tensor, not empty.
    """
    if len(shape) == 1:
        yield (start,), (end - start,), start
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:
        # It begins and ends within one row.
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
