"""Norms for the plain-torch layer specification.

Megatron-Core's `WrappedTorchNorm` does not support sequence parallelism, in which each tensor-parallel rank sees only
part of the sequence and the gradients of the norm's weights must be summed over the ranks. Marking the weights as
`sequence_parallel` makes Megatron-Core compute that sum in `finalize_model_grads`.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension of `[sequence, batch, hidden]`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(_parameter(config, hidden_size, 1.0))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """Layer norm with bias over the last dimension of `[sequence, batch, hidden]`."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(_parameter(config, hidden_size, 1.0))
        self.bias = torch.nn.Parameter(_parameter(config, hidden_size, 0.0))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


def _parameter(config: TransformerConfig, hidden_size: int, value: float) -> torch.Tensor:
    device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
    return torch.full((hidden_size,), value, dtype=config.params_dtype, device=device)
