"""Recipe section `logging`: the run's directory and what is written there."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class LoggingSection:
    """Logs and metrics."""

    run_dir: str
    """Directory of the run: recipe.yaml, metrics.jsonl, checkpoints, tensorboard."""
    log_interval: int = 10
    """Optimizer steps between two log lines."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""

    def __post_init__(self) -> None:
        require(self.log_interval > 0, "logging.log_interval", self.log_interval, "a number above 0")
