"""Recipe section `checkpoint`: where state is saved, how often and what is kept."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Saving and resuming."""

    directory: str | None = None
    """Folder of the checkpoints; null means `checkpoints` inside logging.run_dir. A run resumes from what it finds
    there."""
    save_interval: int | None = None
    """Optimizer steps between two saves; null saves at the end of each phase only."""
    keep: int = 2
    """Checkpoints kept; older ones are removed after a newer one is complete."""
    load: str | None = None
    """Checkpoint folder to take initial weights from when there is nothing to resume."""
    timeout_minutes: float = 30.0
    """A save that takes longer ends the run with an error; the previous checkpoint stays."""

    def __post_init__(self) -> None:
        require(
            self.save_interval is None or self.save_interval > 0,
            "checkpoint.save_interval",
            self.save_interval,
            "null or a number above 0",
        )
        require(self.keep > 0, "checkpoint.keep", self.keep, "a number above 0")
        require(self.timeout_minutes > 0, "checkpoint.timeout_minutes", self.timeout_minutes, "a number above 0")
