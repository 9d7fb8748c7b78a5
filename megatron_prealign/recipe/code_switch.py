"""Recipe section `code_switch`: words of the input replaced by translations during language-model training."""

import math
from dataclasses import dataclass, field
from typing import Literal

from megatron_prealign.recipe.checks import require

LabelMode = Literal["input_only", "codeswitch", "no_predict", "mix"]


@dataclass(frozen=True, kw_only=True)
class CodeSwitchSection:
    """In-batch code-switching (PreAlign, arXiv 2407.16222, stage 2)."""

    ratio: float
    """Share of the words to replace (the authors: 0.05); `ratio_of` says of which words."""
    ratio_of: Literal["occurrences", "words"] = "occurrences"
    """occurrences: `ratio` is the probability that an occurrence of a word the table knows is replaced. words: it is
    the share of all running words, reached by dividing by the coverage measured on the training data at the start."""
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
    source_languages: list[str] = field(default_factory=list)
    """Only rows of these languages are switched; empty means every language the table has keys for."""
    candidate_weights: Literal["table", "uniform"] = "table"
    """How a translation is drawn among those of one language: by the weights in the table, or all alike."""
    min_word_length: int = 1
    """Shortest source word that is replaced, in characters."""
    max_word_length: int | None = None
    """Longest source word that is replaced, in characters; null means any."""
    case: Literal["follow", "keep", "exact"] = "follow"
    """follow: a word is found in any case (the, The, THE) and its translation is written in the same. keep: found in
    any case, the translation is written as in the dictionary. exact: found only as the dictionary writes it."""
    lookahead: int | None = None
    """Tokens read beyond a sample's end to fill a row that translations made shorter, instead of padding it; null means
    the highest ratio times data.seq_length, 0 turns it off."""

    def __post_init__(self) -> None:
        require(0.0 <= self.ratio <= 1.0, "code_switch.ratio", self.ratio, "a number from 0 to 1")
        for language, ratio in self.language_ratios.items():
            require(0.0 <= ratio <= 1.0, f"code_switch.language_ratios.{language}", ratio, "a number from 0 to 1")
        for language, weight in self.language_weights.items():
            require(0 < weight < math.inf, f"code_switch.language_weights.{language}", weight, "a number above 0")
        sources = self.source_languages
        require(len(sources) == len(set(sources)), "code_switch.source_languages", sources, "every language once")
        require(self.min_word_length > 0, "code_switch.min_word_length", self.min_word_length, "a number above 0")
        require(
            self.max_word_length is None or self.max_word_length >= self.min_word_length,
            "code_switch.max_word_length",
            self.max_word_length,
            f"null or at least code_switch.min_word_length = {self.min_word_length}",
        )
        require(
            self.lookahead is None or self.lookahead >= 0,
            "code_switch.lookahead",
            self.lookahead,
            "null or a number, at least 0",
        )
        moving = self.schedule != "constant"
        require(
            moving == (self.final_ratio is not None) and moving == (self.schedule_tokens is not None),
            "code_switch.schedule",
            f"{self.schedule} with final_ratio {_written(self.final_ratio)} and schedule_tokens "
            f"{_written(self.schedule_tokens)}",
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

    @property
    def highest_ratio(self) -> float:
        """The highest ratio that any language reaches during the run; one's own moves with the common one."""
        highest = max(self.ratio, self.final_ratio or 0.0)
        start = self.ratio or self.final_ratio
        scale = highest / start if start else 1.0
        return max([highest, *(min(own * scale, 1.0) for own in self.language_ratios.values())])

    def check_lookahead(self, seq_length: int) -> None:
        """Checks the lookahead against the length of the samples.

        Raises:
            RecipeValueError: it is longer.
        """
        require(
            self.lookahead is None or self.lookahead <= seq_length,
            "code_switch.lookahead",
            self.lookahead,
            f"null or at most data.seq_length ({seq_length})",
        )

    def lookahead_tokens(self, seq_length: int) -> int:
        """Tokens to read beyond the end of a sample of `seq_length` tokens."""
        return round(self.highest_ratio * seq_length) if self.lookahead is None else self.lookahead


def _written(value: float | None) -> str:
    """A value as a recipe writes it."""
    return "null" if value is None else str(value)
