"""Recipe section `alignment_guard`: words of the alignment phase during language-model training."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class AlignmentGuardSection:
    """Keeps alignment from fading: some steps of language-model training carry the words of an alignment step, with the
    settings of section alignment, so that their loss is the language-model loss + alignment.alpha x the alignment
    loss."""

    interval: int = 1
    """Optimizer steps from one such step to the next."""
    floor: float | None = None
    """Only while the word-retrieval P@1 that alignment_watch measured last, mean over the aligned layers and the
    language pairs, is below this; null means always."""

    def __post_init__(self) -> None:
        require(self.interval > 0, "alignment_guard.interval", self.interval, "a number above 0")
        require(
            self.floor is None or 0.0 < self.floor <= 1.0,
            "alignment_guard.floor",
            self.floor,
            "null or a number above 0 and at most 1",
        )
