"""Recipe section `alignment`: the contrastive phase before language-model training."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_prealign.recipe.checks import MOST_LAYERS, require


@dataclass(frozen=True, kw_only=True)
class AlignmentSection:
    """Alignment phase before language-model training (PreAlign, arXiv 2407.16222, stage 1)."""

    train_iters: int
    """Optimizer steps of the phase; 0 skips it, for runs where only alignment_guard uses this section."""
    words_per_step: int
    """Dictionary words per optimizer step, over all ranks. Groups (a word and its translations) are drawn until the
    step is full."""
    lr: float
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the phase; not used if lr_decay_style is constant."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the decay from lr to min_lr."""
    lr_warmup_iters: int = 0
    """Optimizer steps of linear learning-rate warm-up."""
    alpha: float = 1.0
    """Weight of the contrastive loss (the authors of PreAlign use 0.1, later 0.5)."""
    lm_weight: float = 1.0
    """Weight of the language-model loss on samples of the training blend (lambda of the method)."""
    lm_global_batch_size: int = 0
    """Samples of the training blend per optimizer step, over all ranks; 0 trains on words only."""
    gamma: float = 0.0
    """Weight of the penalty on a positive mean similarity over all pairs of words."""
    temperature: float = 0.1
    """Temperature (tau) of the contrastive loss."""
    lm_micro_batch_size: int | None = None
    """Samples of the training blend per forward pass on one data-parallel rank; null means
    training.micro_batch_size."""
    layers: str | list[int] | dict[int, float] = "all"
    """Layers to align: all, a list ([0, 12, 24]), a range ("8-16") or a weight per layer ({0: 1, 12: 2}). 0 is the
    embedding output, i the output of block i, num_layers + 1 the output embedding."""
    freeze: Literal["none", "lower", "upper"] = "none"
    """Half of the transformer blocks to freeze during the phase (AlignFreeze)."""
    projection_size: int | None = None
    """Width of a two-layer projection head on every aligned layer, to whose output the loss is applied; null applies
    the loss to the hidden states."""
    max_word_tokens: int = 8
    """Maximum number of subword tokens per word; longer words are skipped."""
    languages_per_group: int | None = None
    """Number of languages drawn per group, at least 2; null takes one word of every language in the group."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """Sampling weight per language for the draw of languages_per_group. If empty, all languages have equal weight;
    otherwise languages not listed are never drawn."""
    frequency_exponent: float = 0.0
    """Groups are drawn with probability proportional to (count of the source word in the table + 1)^frequency_exponent;
    0 draws uniformly."""
    word_micro_batch_size: int | None = None
    """Words per forward pass on one data-parallel rank; null means all words of the step in one pass. With several
    passes, a first pass without gradients collects all words, so the loss still covers the whole step."""
    stop_at_p_at_1: float | None = None
    """End the phase early once word-retrieval P@1, averaged over the aligned layers, reaches this value; null disables
    early stopping."""
    keep_optimizer: bool = False
    """Carry the optimizer state over into language-model training instead of starting with a fresh state."""

    def __post_init__(self) -> None:
        require(self.words_per_step > 1, "alignment.words_per_step", self.words_per_step, "at least 2")
        require(self.max_word_tokens > 0, "alignment.max_word_tokens", self.max_word_tokens, "a positive number")
        for name in ("lr", "temperature"):
            require(getattr(self, name) > 0, f"alignment.{name}", getattr(self, name), "a positive number")
        for name in ("train_iters", "alpha", "lm_weight", "gamma", "lm_global_batch_size", "lr_warmup_iters"):
            require(getattr(self, name) >= 0, f"alignment.{name}", getattr(self, name), "a non-negative number")
        require(0 <= self.min_lr <= self.lr, "alignment.min_lr", self.min_lr, f"between 0 and alignment.lr ({self.lr})")
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
            "null or a number in (0, 1]",
        )
        for name in ("lm_micro_batch_size", "word_micro_batch_size", "projection_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"alignment.{name}", value, "null or a positive number")
        require(
            self.freeze == "none" or not self.keep_optimizer,
            "alignment.keep_optimizer",
            "true",
            f"false with alignment.freeze {self.freeze}: frozen blocks have no optimizer state to keep",
        )
        require(
            self.alpha > 0 or self.gamma > 0 or (self.lm_weight > 0 and self.lm_global_batch_size > 0),
            "alignment.alpha",
            self.alpha,
            "a positive alpha, a positive gamma, or a positive lm_weight and lm_global_batch_size: nothing is trained",
        )
        self._check_sampling()
        self._selected_layers()

    def _check_sampling(self) -> None:
        require(
            self.languages_per_group is None or self.languages_per_group >= 2,
            "alignment.languages_per_group",
            self.languages_per_group,
            "null or at least 2",
        )
        weights = self.language_weights
        for language, weight in weights.items():
            require(weight > 0, f"alignment.language_weights.{language}", weight, "a positive number")
        require(
            not weights or len(weights) >= 2,
            "alignment.language_weights",
            weights,
            "at least two languages, or none to draw from all of them",
        )
        require(
            self.languages_per_group is not None or len(set(weights.values())) < 2,
            "alignment.language_weights",
            weights,
            "equal weights if alignment.languages_per_group is null, which takes every language of a group; set it to "
            "the number of languages to draw",
        )
        require(
            self.frequency_exponent >= 0,
            "alignment.frequency_exponent",
            self.frequency_exponent,
            "a non-negative number",
        )

    def _selected_layers(self) -> dict[int, float] | None:
        """Weight of each selected layer, not normalised; None if all layers are selected."""
        layers = self.layers
        if isinstance(layers, dict):
            for layer, weight in layers.items():
                require(weight > 0, f"alignment.layers.{layer}", weight, "a positive weight")
            require(bool(layers), "alignment.layers", "empty", "a weight for at least one layer")
            return dict(layers)
        if isinstance(layers, list):
            # An empty list once meant all layers; now it would read as none.
            require(bool(layers), "alignment.layers", layers, "at least one layer, or all")
            require(len(layers) == len(set(layers)), "alignment.layers", layers, "no duplicate layers")
            return dict.fromkeys(layers, 1.0)
        if layers == "all":
            return None
        ends = re.fullmatch(r"(\d+)\s*-\s*(\d+)", layers)
        expected = 'all, a list such as [0, 12, 24], a range such as "8-16" or weights such as {0: 1, 12: 2}'
        require(ends is not None and int(ends[1]) <= int(ends[2]), "alignment.layers", repr(layers), expected)
        assert ends is not None
        require(int(ends[2]) <= MOST_LAYERS, "alignment.layers", repr(layers), f"layers up to {MOST_LAYERS:,}")
        return dict.fromkeys(range(int(ends[1]), int(ends[2]) + 1), 1.0)

    def layer_weights(self, num_layers: int) -> list[float]:
        """Weight of each of the `num_layers + 2` layers in the loss; the weights sum to 1.

        Raises:
            RecipeValueError: a selected layer does not exist.
        """
        last = num_layers + 1
        selected = self._selected_layers() or dict.fromkeys(range(last + 1), 1.0)
        outside = [layer for layer in selected if not 0 <= layer <= last]
        require(
            not outside,
            "alignment.layers",
            f"{self.layers} with layer {', '.join(map(str, outside))}",
            f"layers from 0 to {last} (model.num_layers + 1)",
        )
        total = math.fsum(selected.values())
        return [selected.get(layer, 0.0) / total for layer in range(last + 1)]
