"""Recipe section `training`: how long, in which batches, in which precision, and when to evaluate."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """The training loop."""

    seed: int
    """Seed of the weights, of the order of the data, of the words drawn and of code-switching."""
    micro_batch_size: int
    """Rows of one forward pass on one data-parallel rank."""
    global_batch_size: int
    """Rows of one optimizer step over all ranks."""
    train_iters: int | None = None
    """Optimizer steps of language-model training."""
    train_tokens: int | None = None
    """Total of tokens over all phases, an alternative to train_iters: language-model training gets what alignment
    left."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of weights and activations; the optimizer keeps fp32 master weights either way."""
    eval_interval: int | None = None
    """Optimizer steps between two evaluations; null evaluates at the end of each phase only."""
    eval_samples: int = 256
    """Validation samples of seq_length tokens per language (at most what there is)."""
    retrieval_words: int = 1000
    """Word pairs of the word-retrieval measure."""
    exit_after_minutes: float | None = None
    """Minutes after which the run saves and ends, time for the save included; the same command goes on. null for no
    limit."""
    garbage_collection_interval: int = 100
    """Collect Python garbage every so many steps, on all ranks at once; 0 leaves it to Python."""

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "global_batch_size", "eval_samples", "retrieval_words"):
            require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "a number above 0")
        for name in ("train_iters", "train_tokens", "eval_interval", "exit_after_minutes"):
            value = getattr(self, name)
            require(value is None or value > 0, f"training.{name}", value, "null or a number above 0")
        require(
            (self.train_iters is None) != (self.train_tokens is None),
            "training",
            f"train_iters {self.train_iters} and train_tokens {self.train_tokens}",
            "exactly one of the two to be set",
        )
        require(0 <= self.seed < 2**63, "training.seed", self.seed, "from 0 to 2^63 - 1")
        require(
            self.garbage_collection_interval >= 0,
            "training.garbage_collection_interval",
            self.garbage_collection_interval,
            "0 or more",
        )
