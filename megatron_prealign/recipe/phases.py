"""The phases of a run, as its recipe plans them."""

from dataclasses import dataclass

ALIGNMENT = "alignment"
LANGUAGE_MODEL = "language_model"


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a run."""

    name: str
    """`ALIGNMENT` or `LANGUAGE_MODEL`; checkpoints, metrics and messages name the phase by it."""
    train_iters: int | None
    """Optimizer steps; None where training.train_tokens decides."""
    samples: int
    """Samples of the training blend that each step consumes, over all ranks."""
