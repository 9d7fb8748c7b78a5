"""Recipe section `alignment`: the contrastive phase before language-model training."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class AlignmentSection:
    """Alignment initialisation (PreAlign, arXiv 2407.16222, stage 1)."""

    train_iters: int
    """Optimizer steps of the phase; 0 leaves it out, for a run that only wants the words of alignment_guard."""
    words_per_step: int
    """Dictionary words of one step over all ranks; groups (a word with its translations) are drawn until they fill
    it."""
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
    layers: str | list[int] | dict[int, float] = "all"
    """Layers to align: 0 is the embedding output, i the output of block i, num_layers + 1 the output embedding. all, a
    list ([0, 12, 24]), a range ("8-16"), or a weight for each ({0: 1, 12: 2})."""
    freeze: Literal["none", "lower", "upper"] = "none"
    """Half of the transformer blocks that the phase leaves as they are (AlignFreeze)."""
    projection_size: int | None = None
    """Width of a two-layer projection head on every aligned layer, which the loss then looks at; null aligns the states
    themselves."""
    max_word_tokens: int = 8
    """Words with more subword tokens are left out of the phase."""
    languages_per_group: int | None = None
    """Languages drawn of each group, at least 2; null takes a word of every language that the group has."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """Weight of each language in that draw; empty means all alike, a language left out is never drawn."""
    frequency_exponent: float = 0.0
    """A group is drawn with probability (occurrences of its source word + 1)^frequency_exponent, by the count in the
    table; 0 draws all alike."""
    word_micro_batch_size: int | None = None
    """Words in one forward pass of one data-parallel rank; null takes all of a step. With several, a first pass without
    gradients collects the words, so that the loss stays that of the whole step."""
    stop_at_p_at_1: float | None = None
    """End the phase early when the mean word-retrieval P@1 over the aligned layers reaches this."""
    keep_optimizer: bool = False
    """Carry the optimizer's state into language-model training instead of starting fresh."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "alpha", "lm_weight", "gamma", "temperature"):
            value = getattr(self, name)
            require(math.isfinite(value), f"alignment.{name}", value, "a finite number")
        require(self.words_per_step > 1, "alignment.words_per_step", self.words_per_step, "a number above 1")
        require(self.max_word_tokens > 0, "alignment.max_word_tokens", self.max_word_tokens, "a number above 0")
        for name in ("lr", "temperature"):
            require(getattr(self, name) > 0, f"alignment.{name}", getattr(self, name), "a number above 0")
        for name in ("train_iters", "alpha", "lm_weight", "gamma", "lm_global_batch_size", "lr_warmup_iters"):
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
        for name in ("lm_micro_batch_size", "word_micro_batch_size", "projection_size"):
            value = getattr(self, name)
            require(value is None or value > 0, f"alignment.{name}", value, "null or a number above 0")
        require(
            self.freeze == "none" or not self.keep_optimizer,
            "alignment.keep_optimizer",
            "true",
            f"false with alignment.freeze {self.freeze}: the frozen blocks have no optimizer state to keep",
        )
        require(
            self.alpha > 0 or self.gamma > 0 or (self.lm_weight > 0 and self.lm_global_batch_size > 0),
            "alignment.alpha",
            self.alpha,
            "a number above 0, or gamma above 0, or lm_weight above 0 with lm_global_batch_size: nothing is trained",
        )
        self._check_sampling()
        self._layer_choice()

    def _check_sampling(self) -> None:
        require(
            self.languages_per_group is None or self.languages_per_group >= 2,
            "alignment.languages_per_group",
            self.languages_per_group,
            "null or a number, at least 2",
        )
        weights = self.language_weights
        for language, weight in weights.items():
            require(0 < weight < math.inf, f"alignment.language_weights.{language}", weight, "a number above 0")
        require(
            not weights or len(weights) >= 2,
            "alignment.language_weights",
            weights,
            "two languages or more, or none for all of them",
        )
        require(
            self.languages_per_group is not None or len(set(weights.values())) < 2,
            "alignment.language_weights",
            weights,
            "equal weights while alignment.languages_per_group is null, which takes every language of a group; set it "
            "to the number of languages to draw",
        )
        require(
            0.0 <= self.frequency_exponent < math.inf,
            "alignment.frequency_exponent",
            self.frequency_exponent,
            "0 or more",
        )

    def _layer_choice(self) -> dict[int, float] | None:
        """Weight of each chosen layer, not yet normalised; None for all."""
        layers = self.layers
        if isinstance(layers, dict):
            for layer, weight in layers.items():
                require(0 < weight < math.inf, f"alignment.layers.{layer}", weight, "a weight above 0")
            require(bool(layers), "alignment.layers", "empty", "a weight for one layer or more")
            return dict(layers)
        if isinstance(layers, list):
            # An empty list once meant all; now it would read as none.
            require(bool(layers), "alignment.layers", layers, "one layer or more, or all")
            require(len(layers) == len(set(layers)), "alignment.layers", layers, "every layer once")
            return dict.fromkeys(layers, 1.0)
        if layers == "all":
            return None
        ends = re.fullmatch(r"(\d+)\s*-\s*(\d+)", layers)
        expected = 'all, a list as [0, 12, 24], a range as "8-16" or weights as {0: 1, 12: 2}'
        require(ends is not None and int(ends[1]) <= int(ends[2]), "alignment.layers", repr(layers), expected)
        assert ends is not None
        return dict.fromkeys(range(int(ends[1]), int(ends[2]) + 1), 1.0)

    def layer_weights(self, num_layers: int) -> list[float]:
        """Weight of each of the `num_layers + 2` layers in the loss; they sum to one.

        Raises:
            RecipeValueError: a chosen layer does not exist.
        """
        last = num_layers + 1
        chosen = self._layer_choice() or dict.fromkeys(range(last + 1), 1.0)
        outside = [layer for layer in chosen if not 0 <= layer <= last]
        require(
            not outside,
            "alignment.layers",
            f"{self.layers} with layer {', '.join(map(str, outside))}",
            f"layers from 0 to {last} (model.num_layers + 1)",
        )
        total = math.fsum(chosen.values())
        return [chosen.get(layer, 0.0) / total for layer in range(last + 1)]
