"""Loads a checkpoint: everything to resume a run, or only the weights."""

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
from megatron_prealign.runtime.log import warn_on_rank_zero

logger = logging.getLogger(__name__)

_ADVICE = "rerun with checkpoint.verify set to checksums, which finds the corrupt file and a checkpoint to resume from"


def resume(
    start: StartPoint,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    runtime: Runtime,
    *,
    identity: dict[str, Any],
    run: dict[str, Any],
    auxiliary: AuxiliaryState | None = None,
) -> TrainState:
    """Loads the checkpoint that a run resumes from. Collective: call on all ranks.

    Args:
        start: Start of kind resume or continue.
        identity: `state.model_identity`.
        run: `resume.identity.resume_fingerprint`; `phase` of the result is an index in its phases.
        auxiliary: State to load besides the model and its optimizer; None for none.

    Raises:
        UserError: the checkpoint differs in model, tokenizer, phases, precision, data order or dictionary, or is
            corrupt.
    """
    checkpoint, summary = start.checkpoint, start.summary
    assert summary is not None
    check_model(checkpoint, summary, identity)
    phase = check_run(checkpoint, summary, run)
    _check_tensors(chunks, checkpoint)
    _load(checkpoint, lambda: _load_all(chunks, optimizer, runtime, auxiliary, checkpoint, summary["layout"]))
    logger.info("resumed from %s", checkpoint)
    return TrainState.from_dict({**summary["train_state"], "phase": phase})


def load_weights(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    checkpoint: Path,
    *,
    identity: dict[str, Any],
) -> None:
    """Loads only the weights of a checkpoint, of a run or of weights. Collective: call on all ranks.

    Args:
        optimizer: Optimizer whose master weights are set to the loaded ones; None if there is none.
        checkpoint: Checkpoint directory whose files are verified.
        identity: `state.model_identity`.

    Raises:
        UserError: the checkpoint is of another model or tokenizer, or corrupt.
    """
    check_model(checkpoint, read_state(checkpoint), identity, advice=OTHER_WEIGHTS)
    _check_tensors(chunks, checkpoint)
    _load(checkpoint, lambda: load_model_state(chunks, load_sharded(model_state(chunks), checkpoint)))
    if optimizer is not None:
        optimizer.reload_model_params()
    logger.info("loaded weights from %s", checkpoint)


def _check_tensors(chunks: Sequence[torch.nn.Module], checkpoint: Path) -> None:
    """Checks that the checkpoint has exactly the tensors of the model. Collective: call on all ranks.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message lists them.
    """

    def read() -> tuple[dict[str, tuple[int, ...] | None], dict[str, tuple[int, ...]]]:
        with read_errors_as_user_errors(checkpoint, _ADVICE):
            # The checkpoint may be untrusted, and Megatron-Core unpickles anything.
            metadata = read_metadata(checkpoint / METADATA)
            check_files(checkpoint, metadata)
            return tensor_shapes(model_state(chunks)), saved_shapes(metadata)

    own, saved = on_every_rank(f"reading {checkpoint}", read)
    # Each pipeline stage has only its own tensors.
    by_rank: list[dict[str, tuple[int, ...] | None]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, own, group=control_group())
    expected = {key: shape for shapes in by_rank for key, shape in shapes.items()}
    extra = sorted(key for key in saved if is_weight(key) and key not in expected)
    problems = [f"{key} is missing" for key in sorted(expected) if key not in saved]
    problems += [f"{key} is not in the model" for key in extra]
    problems += [
        f"{key} is {list(saved[key])}, expected {list(shape)}"
        for key, shape in sorted(expected.items())
        if shape is not None and key in saved and saved[key] != shape
    ]
    if problems:
        raise UserError(f"tensors of {checkpoint} do not match the model: {shortened(problems)}; {OTHER_WEIGHTS}")


def _load_all(
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    runtime: Runtime,
    auxiliary: AuxiliaryState | None,
    checkpoint: Path,
    saved_layout: dict[str, Any],
) -> None:
    model = model_state(chunks)
    content = {
        **model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=OPTIMIZER_METADATA),
    }
    if auxiliary is not None:
        content["auxiliary"] = auxiliary.sharded_state_dict()
    same_layout = saved_layout == layout_of(runtime)
    if same_layout:
        content["random_state"] = random_state_of(runtime)
    else:
        warn_on_rank_zero(
            logger,
            "the parallel layout changed since %s: the random states of dropout are seeded again, all other state is "
            "restored",
            checkpoint,
        )
    loaded = load_sharded(content, checkpoint)
    load_model_state(chunks, loaded)
    with torch.no_grad():
        optimizer.load_state_dict(loaded["optimizer"])
        if auxiliary is not None:
            auxiliary.load_state_dict(loaded["auxiliary"])
    if same_layout:
        random_state.restore(loaded["random_state"])


def _load(checkpoint: Path, work: Callable[[], None]) -> None:
    with read_errors_as_user_errors(checkpoint, _ADVICE):
        work()
