"""Checkpoints read again: a run that goes on, and weights taken from another one."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_prealign.checkpoint.folder import LATEST, latest_checkpoint, read_state, resolve_checkpoint
from megatron_prealign.runtime import random_state
from megatron_prealign.runtime.agreement import on_every_rank
from megatron_prealign.runtime.checkpoint_io import OPTIMIZER_METADATA
from megatron_prealign.runtime.checkpoint_load import check_files, load_sharded, read_errors_as_mistakes
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import unwrap
from megatron_prealign.training.run_identity import OTHER_WEIGHTS, check_model, check_run, read_run
from megatron_prealign.training.sharded_state import StateBeside, layout_of, model_state, random_state_of
from megatron_prealign.training.state import TrainState

logger = logging.getLogger(__name__)


def resume(
    directory: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    runtime: Runtime,
    *,
    identity: dict[str, Any],
    run: dict[str, Any],
    beside: StateBeside | None = None,
) -> TrainState | None:
    """Loads the newest checkpoint of this run, if there is one. Takes part: all ranks.

    Args:
        directory: Folder of the run's checkpoints.
        identity: `run_identity.facts_of_model`.
        run: `run_identity.facts_of_run`; the state's `phase` is a position in its phases.
        beside: What is resumed beside the model and its optimizer; None for nothing.

    Raises:
        UserError: it is of another model, tokenizer, phase, number format, order of the data or dictionary, or
            damaged.
    """
    checkpoint = latest_checkpoint(directory)
    if checkpoint is None:
        return None
    summary = read_run(checkpoint)
    check_model(checkpoint, summary, identity)
    phase = check_run(checkpoint, summary, run)
    on_every_rank(f"reading {checkpoint}", lambda: _reading(checkpoint, lambda: check_files(checkpoint)))
    _reading(checkpoint, lambda: _load_all(chunks, optimizer, runtime, beside, checkpoint, summary["layout"]))
    logger.info("resumed from %s", checkpoint)
    return TrainState.from_dict({**summary["train_state"], "phase": phase})


def load_weights(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    path: str | Path,
    *,
    identity: dict[str, Any],
) -> None:
    """Takes the weights alone from a checkpoint of any run. Takes part: all ranks.

    Args:
        optimizer: Takes the weights over as its own; None if there is none.
        identity: `run_identity.facts_of_model`.

    Raises:
        UserError: it is of another model or tokenizer, or damaged.
    """
    checkpoint = resolve_checkpoint(path)
    check_model(checkpoint, read_state(checkpoint), identity, advice=OTHER_WEIGHTS)
    on_every_rank(f"reading {checkpoint}", lambda: _reading(checkpoint, lambda: check_files(checkpoint)))
    _reading(checkpoint, lambda: _take_weights(chunks, load_sharded(model_state(chunks), checkpoint)))
    if optimizer is not None:
        optimizer.reload_model_params()
    logger.info("took the weights of %s", checkpoint)


def _load_all(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    runtime: Runtime,
    beside: StateBeside | None,
    checkpoint: Path,
    saved_layout: dict[str, Any],
) -> None:
    model = model_state(chunks)
    content = {
        **model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=OPTIMIZER_METADATA),
    }
    if beside is not None:
        content["beside"] = beside.sharded_state_dict()
    same_layout = saved_layout == layout_of(runtime)
    if same_layout:
        content["random_state"] = random_state_of(runtime)
    else:
        logger.warning("the layout changed since %s: dropout draws anew, everything else continues", checkpoint)
    loaded = load_sharded(content, checkpoint)
    _take_weights(chunks, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
        if beside is not None:
            beside.load_state_dict(loaded["beside"])
    if same_layout:
        random_state.restore(loaded["random_state"])


def _take_weights(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"])


def _reading(checkpoint: Path, work: Callable[[], None]) -> None:
    advice = f"write the name of an older step_* folder into {checkpoint.parent / LATEST}"
    with read_errors_as_mistakes(checkpoint, advice):
        work()
