"""Recipe section `checkpoint`: where and how often to save, what to keep and what to start from."""

from dataclasses import dataclass
from typing import Literal

from megatron_prealign.recipe.checks import require, require_minutes

Verify = Literal["checksums", "sizes"]
"""How to verify files: read each in full and compare its checksum, or compare only sizes."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Saving, retention and resuming."""

    directory: str | None = None
    """Directory to save checkpoints to and resume from; null means `checkpoints` in logging.run_dir."""
    save_interval: int | None = None
    """Optimizer steps between two checkpoints; null saves only at the end of each phase."""
    async_save: bool = True
    """Write checkpoints in the background: training pauses only to copy the state to host memory. false waits until the
    checkpoint is complete."""
    timeout_minutes: float = 30.0
    """Minutes that a save may take; if it takes longer, the run ends with an error and the previous checkpoint is
    kept."""
    keep: int = 2
    """Number of most recent checkpoints to keep; older ones are deleted once a newer one is complete."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this number; null keeps none."""
    keep_best: str | None = None
    """Metric whose best checkpoint is also kept, such as validation_loss/en; null keeps none. Only checkpoints of steps
    with an evaluation have metrics."""
    keep_best_mode: Literal["min", "max"] = "min"
    """Whether the lowest (min) or the highest (max) value of keep_best is the best."""
    load: str | None = None
    """Checkpoint, or directory of checkpoints, to start from if there is nothing to resume; null initialises the model
    randomly."""
    load_parts: Literal["weights", "all"] = "weights"
    """What to load from checkpoint.load: only the weights, or all of its state, to continue that run."""
    on_damage: Literal["fail", "fall_back"] = "fall_back"
    """If the newest checkpoint is corrupt: fail with an error, or fall_back to the newest intact one."""
    verify: Verify = "checksums"
    """How to verify files before loading them: checksums reads each file in full and compares its checksum, sizes
    compares only file sizes."""

    def __post_init__(self) -> None:
        for name in ("save_interval", "keep_every"):
            value = getattr(self, name)
            require(value is None or value > 0, f"checkpoint.{name}", value, "null or a positive number")
        require(self.keep > 0, "checkpoint.keep", self.keep, "a positive number")
        require_minutes("checkpoint.timeout_minutes", self.timeout_minutes)
        require(
            self.keep_best is None or self.keep_best.strip() != "",
            "checkpoint.keep_best",
            self.keep_best,
            "null or the name of a metric, such as validation_loss/en",
        )
        require(
            self.load_parts == "weights" or self.load is not None,
            "checkpoint.load_parts",
            self.load_parts,
            "weights, because checkpoint.load is null",
        )
