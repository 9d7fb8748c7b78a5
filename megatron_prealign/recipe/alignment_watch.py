"""Recipe section `alignment_watch`: word retrieval and cosine similarity measured during training."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class AlignmentWatchSection:
    """Measures word retrieval and cosine similarity at every layer during training: before the first step, every
    `interval` steps and at the end of each phase."""

    interval: int
    """Optimizer steps between two measurements, counted over the run rather than per phase."""
    words: int = 1000
    """Maximum number of word pairs to measure per language pair."""
    groups: Literal["held_out", "trained"] = "held_out"
    """Dictionary words to measure: held_out (never trained on) or trained."""

    def __post_init__(self) -> None:
        for name in ("interval", "words"):
            require(getattr(self, name) > 0, f"alignment_watch.{name}", getattr(self, name), "a positive number")
        groups = ("held_out", "trained")
        require(self.groups in groups, "alignment_watch.groups", self.groups, f"one of {', '.join(groups)}")
