"""Recipe section `alignment_guard`: steps of language-model training that also train on dictionary words."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class AlignmentGuardSection:
    """Keeps alignment from degrading during language-model training: some steps also train on dictionary words, with
    the settings of section alignment. Their loss is the language-model loss + alignment.alpha x the alignment loss."""

    interval: int = 20
    """Optimizer steps between two steps with words; 1 adds words to every step. On English-Clone, 10 keeps P@1 a little
    higher than 20 and costs English 0.02 nats."""
    floor: float | None = None
    """Add words only while the latest word-retrieval P@1 of alignment_watch, averaged over the aligned layers and the
    language pairs, is below this value; null means always."""

    def __post_init__(self) -> None:
        require(self.interval > 0, "alignment_guard.interval", self.interval, "a positive number")
        require(
            self.floor is None or 0.0 < self.floor <= 1.0,
            "alignment_guard.floor",
            self.floor,
            "null or a number in (0, 1]",
        )
