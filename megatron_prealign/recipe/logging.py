"""Recipe section `logging`: the run directory and what is written to it."""

from dataclasses import dataclass

from megatron_prealign.recipe.checks import require

MAX_PROFILED_STEPS = 100


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
    profile_steps: list[int] | None = None
    """First and last optimizer step of the run to profile, both included ([10, 13] for four steps); every rank writes
    RUN/profile/steps_10-13_rank_0.json.gz and, on a GPU, a snapshot of its memory. null: do not profile."""

    def __post_init__(self) -> None:
        require(self.log_interval > 0, "logging.log_interval", self.log_interval, "a positive number")
        steps = self.profile_steps
        require(
            steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1] < steps[0] + MAX_PROFILED_STEPS),
            "logging.profile_steps",
            steps,
            f"null, or the first and the last step, from 1 and at most {MAX_PROFILED_STEPS} steps: a profile is in "
            "memory until it is written",
        )
