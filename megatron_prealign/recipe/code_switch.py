"""Recipe section `code_switch`: words of the input replaced by translations during language-model training."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_prealign.recipe.checks import require

LabelMode = Literal["input_only", "codeswitch", "no_predict", "mix"]


@dataclass(frozen=True, kw_only=True)
class CodeSwitchSection:
    """In-batch code-switching (PreAlign, arXiv 2407.16222, stage 2)."""

    ratio: float
    """Probability that an occurrence of a word the table knows is replaced (the authors: 0.05)."""
    label_mode: LabelMode = "input_only"
    """What replaced words do to the labels: input_only keeps the original word, codeswitch predicts the translation,
    no_predict scores neither, mix draws one of the first two per word."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the ratio moves to final_ratio over schedule_tokens tokens of the phase."""
    final_ratio: float | None = None
    """Ratio at the end of a linear or cosine schedule."""
    schedule_tokens: int | None = None
    """Tokens over which a linear or cosine schedule runs."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """Weight of each target language in the draw; empty means all languages of the table alike, a language left out is
    never drawn."""
    language_ratios: dict[str, float] = field(default_factory=dict)
    """Ratio of single target languages, where it differs from `ratio`."""

    def __post_init__(self) -> None:
        require(0.0 <= self.ratio <= 1.0, "code_switch.ratio", self.ratio, "a number from 0 to 1")
        for language, ratio in self.language_ratios.items():
            require(0.0 <= ratio <= 1.0, f"code_switch.language_ratios.{language}", ratio, "a number from 0 to 1")
        for language, weight in self.language_weights.items():
            require(weight > 0, f"code_switch.language_weights.{language}", weight, "a number above 0")
        moving = self.schedule != "constant"
        require(
            moving == (self.final_ratio is not None) and moving == (self.schedule_tokens is not None),
            "code_switch.schedule",
            f"{self.schedule} with final_ratio {self.final_ratio} and schedule_tokens {self.schedule_tokens}",
            "both fields for a linear or cosine schedule, neither for a constant one",
        )
        require(
            self.final_ratio is None or 0.0 <= self.final_ratio <= 1.0,
            "code_switch.final_ratio",
            self.final_ratio,
            "a number from 0 to 1",
        )
        require(
            self.schedule_tokens is None or self.schedule_tokens > 0,
            "code_switch.schedule_tokens",
            self.schedule_tokens,
            "a number above 0",
        )
