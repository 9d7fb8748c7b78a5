"""Recipe section `code_switch`: replaces words of the input by translations during language-model training."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_prealign.recipe.checks import require

LabelMode = Literal["input_only", "codeswitch", "no_predict", "mix"]


@dataclass(frozen=True, kw_only=True)
class CodeSwitchSection:
    """Code-switching in the batches of language-model training (PreAlign, arXiv 2407.16222, stage 2)."""

    ratio: float
    """Fraction of words to replace by translations (the authors of PreAlign use 0.05); ratio_of defines which words
    count."""
    ratio_of: Literal["occurrences", "words"] = "occurrences"
    """occurrences: ratio is the probability that an occurrence of a word in the table is replaced. words: ratio is the
    fraction of all running words to replace; it is divided by the table's coverage of the training data, measured at
    the start of the run."""
    label_mode: LabelMode = "input_only"
    """Labels of replaced words: input_only keeps the original word, codeswitch predicts the translation, no_predict
    leaves both out of the loss, mix draws input_only or codeswitch for each word."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the ratio changes from ratio to final_ratio over the first schedule_tokens tokens of the phase."""
    final_ratio: float | None = None
    """Ratio at the end of a linear or cosine schedule; null if the schedule is constant."""
    schedule_tokens: int | None = None
    """Length of a linear or cosine schedule in tokens; null if the schedule is constant."""
    language_weights: dict[str, float] = field(default_factory=dict)
    """Sampling weight per target language. If empty, all languages of the table have equal weight; otherwise languages
    not listed are never drawn."""
    language_ratios: dict[str, float] = field(default_factory=dict)
    """Ratio of individual target languages, where it differs from ratio; a schedule scales it in proportion."""
    source_languages: list[str] = field(default_factory=list)
    """Languages whose samples are switched; empty means every language with keys in the table."""
    candidate_weights: Literal["table", "uniform"] = "table"
    """How to draw among several translations into one language: by their weights in the table, or uniformly."""
    min_word_length: int = 1
    """Minimum length in characters of a source word to replace."""
    max_word_length: int | None = None
    """Maximum length in characters of a source word to replace; null means no limit."""
    case: Literal["follow", "keep", "exact"] = "follow"
    """follow: match words in any case (the, The, THE) and write the translation in the same case. keep: match in any
    case, write the translation as in the dictionary. exact: match words only in the case of the dictionary."""
    lookahead: int | None = None
    """Tokens to read beyond the end of a sample, to fill up sequences that translations shortened; null means the
    highest ratio x data.seq_length, 0 pads such sequences instead."""

    def __post_init__(self) -> None:
        require(0.0 <= self.ratio <= 1.0, "code_switch.ratio", self.ratio, "a number in [0, 1]")
        for language, ratio in self.language_ratios.items():
            require(0.0 <= ratio <= 1.0, f"code_switch.language_ratios.{language}", ratio, "a number in [0, 1]")
        for language, weight in self.language_weights.items():
            require(weight > 0, f"code_switch.language_weights.{language}", weight, "a positive number")
        sources = self.source_languages
        require(len(sources) == len(set(sources)), "code_switch.source_languages", sources, "no duplicate languages")
        require(self.min_word_length > 0, "code_switch.min_word_length", self.min_word_length, "a positive number")
        require(
            self.max_word_length is None or self.max_word_length >= self.min_word_length,
            "code_switch.max_word_length",
            self.max_word_length,
            f"null or at least code_switch.min_word_length ({self.min_word_length})",
            "code_switch.min_word_length",
        )
        require(
            self.lookahead is None or self.lookahead >= 0,
            "code_switch.lookahead",
            self.lookahead,
            "null or a non-negative number",
        )
        moving = self.schedule != "constant"
        require(
            moving == (self.final_ratio is not None) and moving == (self.schedule_tokens is not None),
            "code_switch.schedule",
            f"{self.schedule} with final_ratio {_yaml(self.final_ratio)} and schedule_tokens "
            f"{_yaml(self.schedule_tokens)}",
            "both fields set for a linear or cosine schedule, both null for a constant one",
        )
        require(
            self.final_ratio is None or 0.0 <= self.final_ratio <= 1.0,
            "code_switch.final_ratio",
            self.final_ratio,
            "a number in [0, 1]",
        )
        require(
            self.schedule_tokens is None or self.schedule_tokens > 0,
            "code_switch.schedule_tokens",
            self.schedule_tokens,
            "a positive number",
        )

    @property
    def highest_ratio(self) -> float:
        """Highest ratio that any language reaches during the run; ratios of individual languages scale with the
        schedule."""
        highest = max(self.ratio, self.final_ratio or 0.0)
        start = self.ratio or self.final_ratio
        scale = highest / start if start else 1.0
        return max([highest, *(min(own * scale, 1.0) for own in self.language_ratios.values())])

    def check_lookahead(self, seq_length: int) -> None:
        """Checks that the lookahead is not longer than a sample.

        Raises:
            RecipeValueError: it is longer.
        """
        require(
            self.lookahead is None or self.lookahead <= seq_length,
            "code_switch.lookahead",
            self.lookahead,
            f"null or at most data.seq_length ({seq_length})",
            "data.seq_length",
        )

    def lookahead_tokens(self, seq_length: int) -> int:
        """Tokens to read beyond the end of a sample of `seq_length` tokens."""
        return round(self.highest_ratio * seq_length) if self.lookahead is None else self.lookahead


def _yaml(value: float | None) -> str:
    """The value as written in a recipe."""
    return "null" if value is None else str(value)
