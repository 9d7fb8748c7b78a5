"""Wrappers of Megatron-Core's data parallelism and pipeline schedules."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_prealign.recipe import ParallelSection
from megatron_prealign.runtime.distributed import Runtime

Microbatch = TypeVar("Microbatch")
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
ForwardStep = Callable[[Iterator[Any], Any], tuple[torch.Tensor, LossFunction]]


def wrap_data_parallel(chunks: Sequence[GPTModel], parallel: ParallelSection) -> list[DistributedDataParallel]:
    """Wraps every chunk in DistributedDataParallel, with gradients reduced in fp32."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    # As in Megatron-LM: later chunks of a stage run their backward pass first, so only the first one needs buckets.
    wrapped = [
        DistributedDataParallel(chunk.config, config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        chunks[0].config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def gather_parameters(chunks: Sequence[torch.nn.Module]) -> None:
    """Gathers updated parameters on every rank; required before reading them outside a forward pass.

    With `overlap_param_gather` each rank has only its own updated shard until the next forward pass gathers the rest.
    Collective: call on all ranks of the data-parallel group.
    """
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def unwrap(chunk: torch.nn.Module) -> GPTModel:
    """The `GPTModel` inside a data-parallel wrapper, or the model itself."""
    return chunk.module if isinstance(chunk, DistributedDataParallel) else chunk


def run_schedule(
    runtime: Runtime,
    chunks: Sequence[torch.nn.Module],
    forward_step: ForwardStep,
    microbatches: Sequence[Microbatch],
    *,
    idle: Callable[[], Microbatch],
    shape: tuple[int, int],
    mixed_shapes: bool = False,
    forward_only: bool = False,
) -> None:
    """Runs forward (and backward) over `microbatches` through the pipeline, then finalises the gradients once.

    Args:
        microbatches: Microbatches of this data-parallel rank, the same number on every rank. Megatron-Core averages the
            loss over them, so a forward step that needs a sum multiplies by `schedule_length(...)`.
        idle: Returns a microbatch without loss, which pads the interleaved schedule to a multiple of the pipeline size.
        shape: Sequence length and number of samples of a microbatch, unless `mixed_shapes`.
        mixed_shapes: Whether microbatches differ in shape; stages then send each shape before the tensor.
    """
    padded = [*microbatches]
    while len(padded) < schedule_length(runtime, len(microbatches)):
        # At the front, because the last microbatch starts the gradient reduction and must touch every parameter.
        padded.insert(0, idle())
    config = unwrap(chunks[0]).config
    config.variable_seq_lengths = mixed_shapes and runtime.parallel.pipeline_model_parallel_size > 1
    iterators = [iter(padded) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(padded),
        seq_length=shape[0],
        micro_batch_size=shape[1],
        forward_only=forward_only,
    )


def schedule_length(runtime: Runtime, microbatches: int) -> int:
    """Number of microbatches in the schedule for `microbatches` real ones, including idle ones."""
    if runtime.parallel.virtual_pipeline_model_parallel_size is None:
        return microbatches
    stages = runtime.parallel.pipeline_model_parallel_size
    return -(-microbatches // stages) * stages
