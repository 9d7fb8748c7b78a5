"""Buckets of Megatron-Core's data parallelism as in a large model."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch


@contextmanager
def separate_buckets() -> Iterator[None]:
    """In a worker: `wrap_data_parallel` uses several buckets under overlap, as it does for models of above 40 million
    parameters, each gathered only by the modules that use it.

    With a single bucket the first module gathers the parameters of all. By default each bucket starts to gather the
    next one, which in a tiny model is complete before anything can read it too early.
    """
    from megatron.core.distributed import DistributedDataParallelConfig

    from megatron_prealign.runtime import engine

    config = partial(DistributedDataParallelConfig, bucket_size=1000, align_param_gather=True)
    with patch.object(engine, "DistributedDataParallelConfig", config):
        yield


def forget_updates_of_others(chunk: Any) -> None:
    """Zeroes the parameters that other ranks update, as if they had changed since the last gather."""
    group = chunk.intra_dp_cp_group
    for buffer in chunk.buffers:
        for bucket in buffer.buckets:
            for rank, part in enumerate(bucket.param_data.chunk(group.size())):
                if rank != group.rank():
                    part.zero_()
