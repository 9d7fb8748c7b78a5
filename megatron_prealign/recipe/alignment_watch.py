"""Recipe section `alignment_watch`: how well words and their translations lie together, measured while training."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class AlignmentWatchSection:
    """Word retrieval and cosines at every layer, while training.

    Measured before the first step, every `interval` steps and at the end of each phase.
    """

    interval: int
    """Optimizer steps from one measurement to the next, counted over the run and not over the phase."""
    words: int = 1000
    """Pairs of words to measure for each language pair."""
    groups: Literal["held_out", "trained"] = "held_out"
    """Which words of the dictionary: held_out (never trained on) or trained."""

    def __post_init__(self) -> None:
        for name in ("interval", "words"):
            require(getattr(self, name) > 0, f"alignment_watch.{name}", getattr(self, name), "a number above 0")
        groups = ("held_out", "trained")
        require(self.groups in groups, "alignment_watch.groups", self.groups, f"one of {', '.join(groups)}")
