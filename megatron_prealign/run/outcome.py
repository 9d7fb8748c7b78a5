"""The last lines of a training run: what it reached, where its checkpoint is, which commands usually follow. Imports no
torch."""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.directory import latest_checkpoint
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.recipe import Recipe
from megatron_prealign.text import closing, command, plural
from megatron_prealign.training.metrics_file import METRICS_FILE, MetricsFile

logger = logging.getLogger(__name__)


def outcome(recipe: Recipe, state: TrainState, *, rerun: str | None) -> str:
    """Last lines of a run that finished, or that stopped as requested.

    Args:
        rerun: Command that resumes the run; None if it was started by a launcher, whose command is unknown.
    """
    checkpoint = latest_checkpoint(recipe.checkpoint_dir)
    made = f"trained {plural(state.step, 'step')} and {plural(state.tokens, 'token')} in {recipe.logging.run_dir}"
    made += "".join(f", {text}" for text in _losses(Path(recipe.logging.run_dir) / METRICS_FILE))
    if checkpoint is not None:
        made += f"; checkpoint {checkpoint}"
    if state.stop_requested:
        made += "; stopped as requested, rerun the same command to resume"
        return closing(made, *([] if rerun is None else [rerun]))
    return closing(made, *_next_commands(recipe))


def _next_commands(recipe: Recipe) -> Sequence[str]:
    run_dir = Path(recipe.logging.run_dir)
    # Any text: the user's own comes to mind when there is one to replace.
    generate = command("generate", "--checkpoint", recipe.checkpoint_dir, "--prompt", "The")
    convert = command("convert", "to-hf", "--checkpoint", recipe.checkpoint_dir, "--output", run_dir / "huggingface")
    if recipe.checkpoint_dir != run_dir / "checkpoints":
        # `evaluate` takes a run directory with its checkpoints.
        return [generate, convert]
    name = run_dir.resolve().name.replace("=", "_") or "run"
    return [command("evaluate", "--run", f"{name}={run_dir}", "--output", run_dir / "report"), generate, convert]


def _losses(file: Path) -> list[str]:
    """Losses of the last log line and of the last evaluation; none, with a warning, if they cannot be read."""
    try:
        return _read_losses(MetricsFile(file))
    except OSError as error:
        reason = str(error.strerror)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"a line is no metric of this version: {type(error).__name__}: {error}"
    # The run itself has succeeded.
    logger.warning("WARNING: cannot read the losses of this run from %s (%s)", file, reason)
    return []


def _read_losses(metrics: MetricsFile) -> list[str]:
    texts = []
    trained = _last(metrics.read("train"))
    if trained is not None:
        texts.append(f"training loss {trained['loss']:.4f}")
    evaluated = _last(metrics.read("evaluation"))
    if evaluated is not None and evaluated["validation_loss"]:
        by_language = ", ".join(f"{name} {loss:.4f}" for name, loss in evaluated["validation_loss"].items())
        texts.append(f"validation loss {by_language}")
    return texts


def _last(records: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    return next(iter(deque(records, maxlen=1)), None)
