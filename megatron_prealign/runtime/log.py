"""Rank-aware logging: rank 0 speaks, the others only warn."""

import logging
import os
import re
import sys
import warnings

# What Megatron-Core 0.16.1 and its use of torch say in every process of every run, and no user can act on. That the
# fused libraries are missing is said once, by `doctor`.
_NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "Converting a tensor with requires_grad=True to a scalar",
    "The .grad attribute of a Tensor that is not a leaf Tensor",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
)

logger = logging.getLogger("megatron_prealign")


def _is_worth_saying(record: logging.LogRecord) -> bool:
    """False for what the memory-efficient save of the optimizer makes Megatron-Core say: only one rank holds the
    moments."""
    return "common state dict differs from rank 0" not in record.getMessage()


def configure(rank: int | None = None) -> None:
    """Sends the package's log to standard error: INFO on rank 0, WARNING with the rank's number on the others."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    logging.getLogger("megatron.core.dist_checkpointing.validation").addFilter(_is_worth_saying)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=re.escape(message))


def warn_once(speaker: logging.Logger, message: str, *values: object) -> None:
    """A warning about what all ranks see: the first one says it."""
    if int(os.environ.get("RANK", "0")) == 0:
        speaker.warning(message, *values)
