"""Recipe section `optimizer`: AdamW and the learning-rate schedule of language-model training."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW."""

    lr: float
    """Peak learning rate of language-model training."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from lr to min_lr."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay; biases and norms have none."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Term added to the denominator."""
    clip_grad: float = 1.0
    """Gradient norm to clip to; 0 turns clipping off."""

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "a number above 0")
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"from 0 to optimizer.lr ({self.lr})")
        for name in ("lr_warmup_iters", "weight_decay", "clip_grad"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "0 or more")
        for name in ("adam_beta1", "adam_beta2"):
            require(0.0 <= getattr(self, name) < 1.0, f"optimizer.{name}", getattr(self, name), "from 0 to below 1")
        require(self.adam_eps > 0, "optimizer.adam_eps", self.adam_eps, "a number above 0")
