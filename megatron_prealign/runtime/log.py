"""Rank-aware logging: INFO on rank 0, only warnings on the other ranks."""

import logging
import os
import re
import sys
import warnings

# Warnings that Megatron-Core 0.16.1 and its use of torch emit in every process of every run and that no user can act
# on. `doctor` reports missing fused libraries.
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


def _keep_record(record: logging.LogRecord) -> bool:
    """False for the warning that the memory-efficient save of the optimizer triggers in Megatron-Core, where only one
    rank has the moments."""
    return "common state dict differs from rank 0" not in record.getMessage()


def configure(rank: int | None = None) -> None:
    """Sends the package's log to standard error: INFO on rank 0, WARNING prefixed with the rank on the others."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    logging.getLogger("megatron.core.dist_checkpointing.validation").addFilter(_keep_record)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=re.escape(message))


def warn_on_rank_zero(source: logging.Logger, message: str, *values: object) -> None:
    """Logs a warning that applies to all ranks on rank 0 only."""
    if int(os.environ.get("RANK", "0")) == 0:
        source.warning(message, *values)
