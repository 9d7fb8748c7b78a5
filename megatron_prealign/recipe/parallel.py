"""Recipe section `parallel`: how the model and the batch are distributed over ranks."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require, require_minutes


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Layout over devices. The data-parallel size is the world size / (tensor_model_parallel_size x
    pipeline_model_parallel_size)."""

    tensor_model_parallel_size: int = 1
    """Number of ranks that each layer's weight matrices are partitioned over."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages that the layers are partitioned over."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline stage (interleaved schedule); null means one chunk and the plain 1F1B schedule."""
    sequence_parallel: bool = False
    """Partition norms and residuals along the sequence within each tensor-parallel group."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the reduction of gradients with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the all-gather of updated parameters with the next forward pass; needs use_distributed_optimizer and
    overlap_grad_reduce."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to run on; auto uses CUDA if a GPU is available."""
    distributed_timeout_minutes: float = 10.0
    """Minutes that a collective may take before the run ends with an error."""

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            require(getattr(self, name) > 0, f"parallel.{name}", getattr(self, name), "a positive number")
        virtual = self.virtual_pipeline_model_parallel_size
        require(
            virtual is None or virtual > 1,
            "parallel.virtual_pipeline_model_parallel_size",
            virtual,
            "null or at least 2",
        )
        require(
            virtual is None or self.pipeline_model_parallel_size > 1,
            "parallel.virtual_pipeline_model_parallel_size",
            virtual,
            f"null, because parallel.pipeline_model_parallel_size is {self.pipeline_model_parallel_size}",
            "parallel.pipeline_model_parallel_size",
        )
        require(
            not self.sequence_parallel or self.tensor_model_parallel_size > 1,
            "parallel.sequence_parallel",
            True,
            f"false, because parallel.tensor_model_parallel_size is {self.tensor_model_parallel_size}",
            "parallel.tensor_model_parallel_size",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "parallel.overlap_param_gather",
            True,
            "false unless parallel.use_distributed_optimizer and parallel.overlap_grad_reduce are true",
            "parallel.use_distributed_optimizer",
            "parallel.overlap_grad_reduce",
        )
        require_minutes("parallel.distributed_timeout_minutes", self.distributed_timeout_minutes)

    @property
    def model_chunks(self) -> int:
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size
