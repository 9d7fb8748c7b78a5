"""Recipe section `parallel`: how the model and the batch are spread over processes."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Layout over devices. The data-parallel size is what the world size leaves after tensor and pipeline."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the stack of layers."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per stage (interleaved schedule); null means one chunk and the plain 1F1B schedule."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence inside a tensor-parallel group."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs (needs the distributed optimizer)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA when there is a GPU."""
    distributed_timeout_minutes: float = 10.0
    """A collective that takes longer ends the run with an error."""

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            require(getattr(self, name) > 0, f"parallel.{name}", getattr(self, name), "a number above 0")
        virtual = self.virtual_pipeline_model_parallel_size
        require(
            virtual is None or virtual > 1,
            "parallel.virtual_pipeline_model_parallel_size",
            virtual,
            "null or a number above 1",
        )
        require(
            virtual is None or self.pipeline_model_parallel_size > 1,
            "parallel.virtual_pipeline_model_parallel_size",
            virtual,
            f"null, because parallel.pipeline_model_parallel_size is {self.pipeline_model_parallel_size}",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel",
            True,
            f"false, because parallel.tensor_model_parallel_size is {self.tensor_model_parallel_size}",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather",
            True,
            "false, unless parallel.use_distributed_optimizer and parallel.overlap_grad_reduce are true",
        )
        require(
            self.distributed_timeout_minutes > 0,
            "parallel.distributed_timeout_minutes",
            self.distributed_timeout_minutes,
            "a number above 0",
        )

    @property
    def model_chunks(self) -> int:
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size
