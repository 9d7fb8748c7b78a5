"""Recipe section `logging`: the run directory and what is written to it."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class LoggingSection:
    """Run directory, logs and metrics."""

    run_dir: str
    """Directory of the run: recipe.yaml, metrics.jsonl, checkpoints and TensorBoard files."""
    log_interval: int = 10
    """Optimizer steps between two log lines."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""

    def __post_init__(self) -> None:
        require(self.log_interval > 0, "logging.log_interval", self.log_interval, "a positive number")
