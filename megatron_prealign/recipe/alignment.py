"""Recipe section `alignment`: the contrastive phase before language-model training."""

from dataclasses import dataclass, field

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class AlignmentSection:
    """Alignment initialisation (PreAlign, arXiv 2407.16222, stage 1)."""

    train_iters: int
    """Optimizer steps of the phase."""
    groups_per_step: int
    """Dictionary entries (a word with its translations) drawn per step, over all ranks."""
    lr: float
    """Peak learning rate of the phase."""
    min_lr: float = 0.0
    """Learning rate at the end of the phase (unless lr_decay_style is constant)."""
    lr_decay_style: str = "constant"
    """constant, linear or cosine."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    alpha: float = 1.0
    """Weight of the contrastive loss (the authors: 0.1, later 0.5)."""
    lm_weight: float = 1.0
    """Weight of the language-model loss on rows of the training blend (lambda in the method)."""
    lm_global_batch_size: int = 0
    """Rows of the training blend per step, over all ranks; 0 trains on words alone."""
    gamma: float = 0.0
    """Weight of the penalty on a positive mean similarity of all pairs."""
    temperature: float = 0.1
    """Temperature tau of the contrastive loss."""
    lm_micro_batch_size: int | None = None
    """Rows of the blend in one forward pass on one data-parallel rank; null means training.micro_batch_size."""
    layers: list[int] = field(default_factory=list)
    """Layers to align: 0 is the embedding output, i the output of block i, num_layers + 1 the output embedding; empty
    means all."""
    max_word_tokens: int = 8
    """Words with more subword tokens are left out of the phase."""
    stop_at_p_at_1: float | None = None
    """End the phase early when the mean word-retrieval P@1 over the aligned layers reaches this."""
    keep_optimizer: bool = False
    """Carry the optimizer's state into language-model training instead of starting fresh."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "groups_per_step", "max_word_tokens"):
            require(getattr(self, name) > 0, f"alignment.{name}", getattr(self, name), "a number above 0")
        for name in ("lr", "temperature"):
            require(getattr(self, name) > 0, f"alignment.{name}", getattr(self, name), "a number above 0")
        for name in ("alpha", "lm_weight", "gamma", "lm_global_batch_size", "lr_warmup_iters"):
            require(getattr(self, name) >= 0, f"alignment.{name}", getattr(self, name), "0 or more")
        require(0 <= self.min_lr <= self.lr, "alignment.min_lr", self.min_lr, f"from 0 to alignment.lr ({self.lr})")
        styles = ("constant", "linear", "cosine")
        require(
            self.lr_decay_style in styles,
            "alignment.lr_decay_style",
            self.lr_decay_style,
            f"one of {', '.join(styles)}",
        )
        require(
            self.stop_at_p_at_1 is None or 0.0 < self.stop_at_p_at_1 <= 1.0,
            "alignment.stop_at_p_at_1",
            self.stop_at_p_at_1,
            "null or a number above 0 and at most 1",
        )
        require(
            self.lm_micro_batch_size is None or self.lm_micro_batch_size > 0,
            "alignment.lm_micro_batch_size",
            self.lm_micro_batch_size,
            "null or a number above 0",
        )
        require(len(self.layers) == len(set(self.layers)), "alignment.layers", self.layers, "every layer once")
