"""Recipe section `logging`: the run directory and what is written to it."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require


@dataclass(frozen=True, kw_only=True)
class LoggingSection:
    """Run directory, logs and metrics."""

    run_dir: str
    """Directory of the run: recipe.yaml, metrics.jsonl, checkpoints, files of TensorBoard and wandb."""
    log_interval: int = 10
    """Optimizer steps between two log lines."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""
    wandb: bool = False
    """Also send metrics to Weights & Biases (megatron-prealign[wandb]), configured by its variables: WANDB_PROJECT,
    WANDB_MODE=offline and others."""

    def __post_init__(self) -> None:
        require(self.log_interval > 0, "logging.log_interval", self.log_interval, "a positive number")
