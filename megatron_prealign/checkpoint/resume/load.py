"""Checkpoints read again: a run that goes on, and weights taken from another one."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer

from megatron_prealign.checkpoint.resume.identity import OTHER_WEIGHTS, check_model, check_run
from megatron_prealign.checkpoint.resume.start import StartPoint
from megatron_prealign.checkpoint.sharded.load import (
    check_files,
    load_sharded,
    read_errors_as_user_errors,
    saved_shapes,
    tensor_shapes,
)
from megatron_prealign.checkpoint.sharded.model_state import (
    AuxiliaryState,
    layout_of,
    load_model_state,
    model_state,
    random_state_of,
)
from megatron_prealign.checkpoint.sharded.optimizer_state import OPTIMIZER_METADATA
from megatron_prealign.checkpoint.single_process.weights import is_weight
from megatron_prealign.checkpoint.state import read_state
from megatron_prealign.checkpoint.torch_dist import METADATA, read_metadata
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError, shortened
from megatron_prealign.runtime import random_state
from megatron_prealign.runtime.agreement import control_group, on_every_rank
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.log import warn_once

logger = logging.getLogger(__name__)

_ADVICE = "start again with checkpoint.verify checksums, which finds the damaged file and what to go on from"


def resume(
    start: StartPoint,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    runtime: Runtime,
    *,
    identity: dict[str, Any],
    run: dict[str, Any],
    beside: AuxiliaryState | None = None,
) -> TrainState:
    """Loads all of the checkpoint that a run goes on from. Takes part: all ranks.

    Args:
        start: Of the kind resume or continue.
        identity: `state.model_identity`.
        run: `resume.identity.resume_fingerprint`; the state's `phase` is a position in its phases.
        beside: What is resumed beside the model and its optimizer; None for nothing.

    Raises:
        UserError: it is of another model, tokenizer, phase, number format, order of the data or dictionary, or
            damaged.
    """
    checkpoint, summary = start.checkpoint, start.summary
    assert summary is not None
    check_model(checkpoint, summary, identity)
    phase = check_run(checkpoint, summary, run)
    _check_tensors(chunks, checkpoint)
    _reading(checkpoint, lambda: _load_all(chunks, optimizer, runtime, beside, checkpoint, summary["layout"]))
    logger.info("resumed from %s", checkpoint)
    return TrainState.from_dict({**summary["train_state"], "phase": phase})


def load_weights(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    checkpoint: Path,
    *,
    identity: dict[str, Any],
) -> None:
    """Takes the weights alone from a checkpoint of any run, or from one that holds nothing else. Takes part: all ranks.

    Args:
        optimizer: Takes the weights over as its own; None if there is none.
        checkpoint: Its files were verified.
        identity: `state.model_identity`.

    Raises:
        UserError: it is of another model or tokenizer, or damaged.
    """
    check_model(checkpoint, read_state(checkpoint), identity, advice=OTHER_WEIGHTS)
    _check_tensors(chunks, checkpoint)
    _reading(checkpoint, lambda: load_model_state(chunks, load_sharded(model_state(chunks), checkpoint)))
    if optimizer is not None:
        optimizer.reload_model_params()
    logger.info("took the weights of %s", checkpoint)


def _check_tensors(chunks: Sequence[torch.nn.Module], checkpoint: Path) -> None:
    """Checks that the checkpoint has the tensors of the model and no others. Takes part: all ranks.

    Raises:
        UserError: a tensor is missing, too many or of another shape; all are named.
    """

    def read() -> tuple[dict[str, tuple[int, ...] | None], dict[str, tuple[int, ...]]]:
        with read_errors_as_user_errors(checkpoint, _ADVICE):
            # The checkpoint may be somebody else's, and Megatron-Core reads its pickles without looking.
            metadata = read_metadata(checkpoint / METADATA)
            check_files(checkpoint, metadata)
            return tensor_shapes(model_state(chunks)), saved_shapes(metadata)

    own, saved = on_every_rank(f"reading {checkpoint}", read)
    # Each stage of a pipeline knows its own tensors.
    each: list[dict[str, tuple[int, ...] | None]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(each, own, group=control_group())
    wanted = {key: shape for shapes in each for key, shape in shapes.items()}
    extra = sorted(key for key in saved if is_weight(key) and key not in wanted)
    problems = [f"{key} is missing" for key in sorted(wanted) if key not in saved]
    problems += [f"{key} is there and not in the model" for key in extra]
    problems += [
        f"{key} is {list(saved[key])}, expected {list(shape)}"
        for key, shape in sorted(wanted.items())
        if shape is not None and key in saved and saved[key] != shape
    ]
    if problems:
        raise UserError(f"{checkpoint} does not have the tensors of the model: {shortened(problems)}; {OTHER_WEIGHTS}")


def _load_all(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    runtime: Runtime,
    beside: AuxiliaryState | None,
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
        warn_once(logger, "the layout changed since %s: dropout draws anew, everything else continues", checkpoint)
    loaded = load_sharded(content, checkpoint)
    load_model_state(chunks, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
        if beside is not None:
            beside.load_state_dict(loaded["beside"])
    if same_layout:
        random_state.restore(loaded["random_state"])


def _reading(checkpoint: Path, work: Callable[[], None]) -> None:
    with read_errors_as_user_errors(checkpoint, _ADVICE):
        work()
