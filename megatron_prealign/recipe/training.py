"""Recipe section `training`: length, batch sizes, precision and evaluation."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require, require_minutes


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """Length, batch sizes, precision and evaluation."""

    seed: int
    """Seed of weight initialisation, data order, word sampling and code-switching."""
    micro_batch_size: int
    """Samples per forward pass on one data-parallel rank."""
    global_batch_size: int
    """Samples per optimizer step of language-model training, over all ranks."""
    train_iters: int | None = None
    """Optimizer steps of language-model training; set either this or train_tokens."""
    train_tokens: int | None = None
    """Total number of tokens over all phases, instead of train_iters; language-model training gets the tokens that the
    alignment phase and the words of the guard do not use. With alignment_guard.floor, the guard's words are not
    counted in advance."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Dtype of weights and activations; the optimizer keeps fp32 master weights in both cases."""
    eval_interval: int | None = None
    """Optimizer steps between two evaluations; null evaluates only at the end of each phase."""
    eval_samples: int = 256
    """Maximum number of validation samples (of data.seq_length tokens) per language."""
    retrieval_words: int = 1000
    """Maximum number of word pairs per language pair for word retrieval."""
    retrieval_sentences: int = 500
    """Maximum number of sentence pairs of each entry of data.parallel_text for sentence retrieval."""
    exit_after_minutes: float | None = None
    """Save a checkpoint and exit before this many minutes have passed; the same command resumes the run. null means no
    limit."""
    garbage_collection_interval: int = 100
    """Optimizer steps between two Python garbage collections, run on all ranks at once; 0 leaves them to Python."""

    def __post_init__(self) -> None:
        counts = ("micro_batch_size", "global_batch_size", "eval_samples", "retrieval_words", "retrieval_sentences")
        for name in counts:
            require(getattr(self, name) > 0, f"training.{name}", getattr(self, name), "a positive number")
        for name in ("train_iters", "train_tokens", "eval_interval"):
            value = getattr(self, name)
            require(value is None or value > 0, f"training.{name}", value, "null or a positive number")
        require_minutes("training.exit_after_minutes", self.exit_after_minutes)
        require(
            (self.train_iters is None) != (self.train_tokens is None),
            "training",
            f"train_iters {self.train_iters} and train_tokens {self.train_tokens}",
            "exactly one of the two to be set",
        )
        require(0 <= self.seed < 2**63, "training.seed", self.seed, "0 to 2^63 - 1")
        require(
            self.garbage_collection_interval >= 0,
            "training.garbage_collection_interval",
            self.garbage_collection_interval,
            "a non-negative number",
        )
