"""The phases of a run, as planned by its recipe."""

from dataclasses import dataclass

ALIGNMENT = "alignment"
LANGUAGE_MODEL = "language_model"


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a run."""

    name: str
    """`ALIGNMENT` or `LANGUAGE_MODEL`; used in checkpoints, metrics and messages."""
    train_iters: int | None
    """Optimizer steps; None if training.train_tokens determines them."""
    samples: int
    """Samples of the training blend consumed per step, over all ranks."""
