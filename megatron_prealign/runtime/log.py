"""Rank-aware logging: rank 0 speaks, the others only warn."""

import logging
import os
import sys
import warnings

# Megatron-Core says at every import that Transformer Engine and Apex are missing, up to seven times a process;
# `doctor` says it once.
_IMPORT_NOISE = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "Converting a tensor with requires_grad=True to a scalar",
)


logger = logging.getLogger("megatron_prealign")


def configure(rank: int | None = None) -> None:
    """Sends the package's log to standard error: INFO on rank 0, WARNING with the rank's number on the others."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    package = logger
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    package.propagate = False
    for message in _IMPORT_NOISE:
        warnings.filterwarnings("ignore", message=message)
