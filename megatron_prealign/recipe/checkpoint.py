"""Recipe section `checkpoint`: where state is saved, how often, what is kept and what a run starts from."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Saving and resuming."""

    directory: str | None = None
    """Directory of the checkpoints; null means `checkpoints` inside logging.run_dir. A run resumes from what it finds
    there."""
    save_interval: int | None = None
    """Optimizer steps between two saves; null saves at the end of each phase only."""
    async_save: bool = True
    """Training goes on while a checkpoint is written, after a pause for its copy into host memory; false waits until
    it is complete."""
    timeout_minutes: float = 30.0
    """A save that takes longer ends the run with an error; the previous checkpoint stays."""
    keep: int = 2
    """Newest checkpoints kept; older ones are removed after a newer one is complete."""
    keep_every: int | None = None
    """Checkpoints at multiples of so many optimizer steps are kept for good; null for none."""
    keep_best: str | None = None
    """Measure whose best checkpoint is kept too, such as validation_loss/en; null for none. Only checkpoints of steps
    with an evaluation have measures."""
    keep_best_mode: Literal["min", "max"] = "min"
    """Whether a low or a high keep_best is the best."""
    load: str | None = None
    """Checkpoint directory to start from when there is nothing to resume."""
    load_parts: Literal["weights", "all"] = "weights"
    """What is taken from checkpoint.load: its weights alone, or all of it, to go on where that run was."""
    on_damage: Literal["fail", "fall_back"] = "fall_back"
    """When the newest checkpoint is damaged: end with an error, or go on from the newest one that is not."""
    verify: Literal["checksums", "sizes"] = "checksums"
    """How files are checked before they are loaded: read whole and compared with their checksums, or by their sizes
    alone."""

    def __post_init__(self) -> None:
        for name in ("save_interval", "keep_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"checkpoint.{name}", value, "null or a number above 0")
        require(self.keep > 0, "checkpoint.keep", self.keep, "a number above 0")
        require(self.timeout_minutes > 0, "checkpoint.timeout_minutes", self.timeout_minutes, "a number above 0")
        require(
            self.keep_best is None or self.keep_best.strip() != "",
            "checkpoint.keep_best",
            self.keep_best,
            "null or the name of a measure, such as validation_loss/en",
        )
        require(
            self.load_parts == "weights" or self.load is not None,
            "checkpoint.load_parts",
            self.load_parts,
            "weights, or checkpoint.load set",
        )
