"""The exception for errors that a user can fix, and its conversion from operating system errors."""

import errno
import os
import re
from collections.abc import Iterable

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers for a full disk, an exhausted quota or an exceeded file size limit."""
DISK_ERRORS = DISK_FULL | {errno.EROFS, errno.EIO}
"""Error numbers that concern the output disk, whatever the operation."""
# Libraries written in Rust (safetensors, tokenizers) report the error number only in their text.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")

# torch's error for memory that the system refuses, and for a size that no number of bytes can hold.
_TORCH_ALLOCATION = re.compile(
    r"can't allocate memory: (you tried to allocate \d+ bytes)|(Storage size calculation .*)"
)
# Message of torch's caching allocator (c10/cuda/CUDACachingAllocator.cpp).
_GPU_ALLOCATION = re.compile(
    r"CUDA out of memory\. Tried to allocate ([^ ]+ \w+)\. "
    r"(GPU \d+) has a total capacity of (.*?) of which (.*?) is free\."
)
# The runtime, the driver and cuBLAS report it in words of their own, without sizes (C10_CUDA_CHECK in c10,
# C10_CUDA_DRIVER_CHECK and TORCH_CUDABLAS_CHECK in the headers of torch 2.13).
_GPU_REFUSAL = re.compile(r"CUDA (?:driver )?error: (?:out of memory|CUBLAS_STATUS_ALLOC_FAILED)")
_GPU_ADVICE = (
    "lower training.micro_batch_size or alignment.word_micro_batch_size, set model.recompute_granularity: full, or use "
    "more GPUs (parallel)"
)


class UserError(Exception):
    """An error in the user's files, recipe or command line.

    The command line prints it as one line without a traceback and exits with status 2, so the message itself must say
    what is wrong and where, what was found and expected, and what to do.
    """

    exit_status = 2
    agreed = False
    """Whether rank 0 prints the same message, so that other ranks need not."""


def to_user_error(error: OSError) -> UserError | None:
    """Converts an operating system error to a one-line error for the user.

    Returns:
        The error, or None if it names no file and concerns neither the disk nor memory: that is a bug in this package.
    """
    if error.strerror is None:
        return None
    if error.errno == errno.ENOMEM:
        # Of mmap or fork, or of opening a file.
        return _out_of_memory(error.strerror if error.filename is None else f"{error.filename}: {error.strerror}")
    if error.filename is None:
        # Writes to an open file do not report its name.
        return write_error("output", error.errno) if error.errno in DISK_ERRORS else None
    return UserError(
        f"{error.filename}: {error.strerror} ({type(error).__name__}); check the path, its permissions and free disk "
        "space"
    )


def memory_error(error: MemoryError | RuntimeError) -> UserError | None:
    """Converts a refused allocation of memory, of the host or of a GPU, to a one-line error for the user.

    Returns:
        The error; None for a RuntimeError of another kind (torch raises one where numpy raises a MemoryError).
    """
    reason = " ".join(str(error).split())
    if (found := _GPU_ALLOCATION.search(reason)) is not None:
        size = f"{found[2]} ({found[3]}, {found[4]} free): tried to allocate {found[1]}"
        return UserError(f"out of memory on {size}; {_GPU_ADVICE}")
    if (found := _GPU_REFUSAL.search(reason)) is not None:
        return UserError(f"out of memory on a GPU ({found[0]}); {_GPU_ADVICE}")
    if not isinstance(error, MemoryError):
        found = _TORCH_ALLOCATION.search(reason)
        if found is None:
            return None
        reason = found[1] or found[2]
    return _out_of_memory(reason)


def _out_of_memory(reason: str) -> UserError:
    return UserError(
        f"out of memory{': ' if reason else ''}{reason}; use a smaller model, fewer steps or samples or a machine with "
        "more memory"
    )


def write_error(what: object, number: int | None, *, note: str = "") -> UserError:
    """Builds the error for output that cannot be written.

    Args:
        what: Path or description of the output.
        number: Error number of the operating system; None if unknown.
        note: State of existing or partial output, added to the message.
    """
    reason = "unknown error" if number is None else os.strerror(number)
    advice = "free disk space" if number in DISK_FULL else "check permissions"
    return UserError(f"cannot write {what}: {reason}; {note}{'; ' if note else ''}{advice} or choose another path")


def shortened(items: Iterable[str], most: int = 20, separator: str = ", ") -> str:
    """Joins the first `most` items and appends how many more there are."""
    items = list(items)
    rest = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return separator.join([*items[:most], *rest])


def system_errno(error: BaseException | None) -> int | None:
    """Error number of the operating system error that caused `error`, or None.

    Libraries may wrap it in an exception of their own (torch raises a RuntimeError).
    """
    if match := _RUST_ERROR.search(str(error)):
        return int(match[1])
    while isinstance(error, OSError | RuntimeError):
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None
