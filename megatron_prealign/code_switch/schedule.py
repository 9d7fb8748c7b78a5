"""Switching ratio of every target language as a function of the consumed tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prealign.recipe import CodeSwitchSection


@dataclass(frozen=True)
class RatioSchedule:
    """Ratios of a run's target languages; a function of consumed tokens only, so it needs no state to resume."""

    section: CodeSwitchSection
    languages: Sequence[str]
    """Target languages, in the order of the ratios returned."""

    def base_ratio(self, consumed_tokens: int) -> float:
        """Ratio of languages without their own ratio, after `consumed_tokens` tokens of the phase."""
        start, end = self.section.ratio, self.section.final_ratio
        if self.section.schedule == "constant" or end is None or self.section.schedule_tokens is None:
            return start
        progress = min(max(consumed_tokens / self.section.schedule_tokens, 0.0), 1.0)
        if self.section.schedule == "cosine":
            progress = (1.0 - math.cos(math.pi * progress)) / 2.0
        return start * (1.0 - progress) + end * progress

    def ratios(self, consumed_tokens: int) -> list[float]:
        """Ratio of every language after `consumed_tokens` tokens of the phase.

        A language's own ratio is scaled in proportion to the common one: halved when that is halved. If the common
        ratio starts at 0, the language's own ratio is its value at the end of the schedule. No ratio exceeds 1.
        """
        base = self.base_ratio(consumed_tokens)
        reference = self.section.ratio or self.section.final_ratio
        # without a common ratio there is nothing to scale by
        scale = base / reference if reference else 1.0
        own = self.section.language_ratios
        return [min(own[language] * scale, 1.0) if language in own else base for language in self.languages]
