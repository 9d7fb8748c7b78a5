"""Recipe section `optimizer`: AdamW and the learning-rate schedule of language-model training."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW and the learning-rate schedule of language-model training."""

    lr: float
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from lr to min_lr."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear learning-rate warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay; not applied to biases and norms."""
    adam_beta1: float = 0.9
    """Decay rate of the first moment."""
    adam_beta2: float = 0.95
    """Decay rate of the second moment."""
    adam_eps: float = 1e-8
    """Epsilon added to the denominator of the update."""
    clip_grad: float = 1.0
    """Maximum gradient norm; 0 disables clipping."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"between 0 and optimizer.lr ({self.lr})")
        for name in ("lr_warmup_iters", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "a non-negative number")
        for name in ("adam_beta1", "adam_beta2"):
            require(0.0 <= getattr(self, name) < 1.0, f"optimizer.{name}", getattr(self, name), "a number in [0, 1)")
        require(self.adam_eps > 0, "optimizer.adam_eps", self.adam_eps, "a positive number")
