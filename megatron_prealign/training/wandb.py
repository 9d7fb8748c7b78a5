"""Metrics of a run on Weights & Biases (https://wandb.ai), with the optional package wandb.

Project, entity, name, mode and server come from the variables that wandb reads itself (WANDB_PROJECT, WANDB_MODE, ...).
"""

import logging
import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.recipe import Recipe
from megatron_prealign.training.metrics_log import scalars

logger = logging.getLogger(__name__)

PROJECT = "megatron-prealign"
"""Project of runs without WANDB_PROJECT."""
ID_FILE = "wandb_run_id"
"""File in the run directory with the id of its run on Weights & Biases, which a resumed run continues."""


def check_wandb(recipe: Recipe) -> None:
    """Checks that the package is installed if the recipe needs it.

    Raises:
        UserError: It is not.
    """
    if not recipe.logging.wandb:
        return
    try:
        # Not by looking for the module: wandb creates a directory of that name in the current one.
        version("wandb")
    except PackageNotFoundError:
        raise UserError(
            "logging.wandb is true, but the package wandb is not installed; "
            "pip install 'megatron-prealign[wandb]', or set logging.wandb to false"
        ) from None


class Wandb:
    """Sends the scalars of records to a run on Weights & Biases."""

    name = "Weights & Biases"

    def __init__(self, run: Any) -> None:
        self._run = run
        # wandb drops values of a step before its last one; a resumed run may repeat steps, and saves end later than
        # they start. A metric of our own as the horizontal axis may decrease.
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({"step": record["step"], **scalars(record)})

    def close(self) -> None:
        # After an error the run is shown as failed.
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def start_wandb(recipe: Recipe) -> list[Wandb]:
    """Starts or resumes the run on Weights & Biases; returns no sink, with a warning, if its server cannot be reached.

    Raises:
        UserError: wandb is not configured, for example without an API key.
        OSError: The run directory is not writable.
    """
    import wandb

    run_dir = Path(recipe.logging.run_dir)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run_dir.resolve().name),
            id=_run_id(run_dir),
            resume="allow",
            dir=str(run_dir),
            config=asdict(recipe),
            # Leaves a run of the calling program alone.
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
    except OSError:
        raise
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError, ValueError) as error:
        raise UserError(
            f"logging.wandb is true, but wandb cannot start: {_one_line(error)}; run `wandb login`, set "
            "WANDB_MODE=offline, or set logging.wandb to false"
        ) from error
    except Exception as error:
        logger.warning("no metrics on Weights & Biases in this run: %s: %s", type(error).__name__, _one_line(error))
        return []
    if run.offline:
        logger.info("Weights & Biases: offline, upload with: wandb sync %s", Path(run.dir).parent)
    else:
        logger.info("Weights & Biases: %s", run.url)
    return [Wandb(run)]


def _run_id(run_dir: Path) -> str:
    """Id of the run in this directory: WANDB_RUN_ID, the one in the directory, or a new one, which is kept there."""
    path = run_dir / ID_FILE
    chosen = os.environ.get("WANDB_RUN_ID")
    if chosen is None and path.exists():
        return path.read_text(encoding="utf-8").strip()
    run_id = chosen or secrets.token_hex(4)
    with write_atomically(path) as temporary:
        temporary.write_text(f"{run_id}\n", encoding="utf-8")
    return run_id


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
