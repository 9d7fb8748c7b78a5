"""Propagates results and failures of work on single ranks to all ranks, so that no rank waits for a failed one.

Without an explicit group, ranks communicate over the run's control group, which `runtime.distributed.start` creates: a
gloo group with a separate timeout, since one rank may build an index or write a checkpoint for longer than any
collective of the training may take.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_prealign import interrupts
from megatron_prealign.errors import UserError, memory_error, to_user_error
from megatron_prealign.runtime import heartbeat

Result = TypeVar("Result")

# Default group at creation, control group, timeout. Valid only while that default group is in use.
_control: tuple[dist.ProcessGroup, dist.ProcessGroup, timedelta] | None = None


class RankError(RuntimeError):
    """Another rank failed; contains the message of that rank."""


def open_control_group(timeout: timedelta) -> None:
    """Creates the control group unless one with at least this timeout exists. Collective: call on all ranks."""
    global _control
    world = dist.group.WORLD
    assert world is not None, "the process group is not initialised"
    if _control is None or _control[0] is not world or _control[2] < timeout:
        _control = (world, dist.new_group(backend="gloo", timeout=timeout), timeout)


def control_group() -> dist.ProcessGroup | None:
    """The run's control group; None, which selects torch's default group, if there is none."""
    return _control[1] if _control is not None and _control[0] is dist.group.WORLD else None


def all_ranks_ok(error: BaseException | None, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Raises on all ranks if any rank passes an error.

    Collective: call on all ranks of `group` (one collective, a second one only after a failure).

    Args:
        error: Error of this rank, or None.
        what: Description of the work, for messages.

    Raises:
        UserError: A rank passed a UserError, or the error of an allocation that the system refused (the message is that
            of the first such rank; `agreed` is True if rank 0 raises the same), or a process has ended.
        RankError: Another rank passed another error. A rank that passed an error raises its own.
    """
    if isinstance(error, MemoryError | RuntimeError) and (refused := memory_error(error)) is not None:
        # One line on all ranks; a RankError would be a traceback.
        refused.__cause__ = error
        error = refused
    group = group or control_group()
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    failed = torch.tensor([0 if error is None else 1], device=device)
    try:
        dist.all_reduce(failed, group=group)
    except RuntimeError as lost:
        if error is not None:
            raise error from lost
        raise UserError(_lost_rank_message(what, lost)) from lost
    if int(failed) == 0:
        return
    reports: list[tuple[str, str] | None] = [None] * dist.get_world_size(group)
    own = None if error is None else (type(error).__name__, str(error))
    dist.all_gather_object(reports, own, group=group)
    failures = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
    # A UserError is more helpful than other failures, which may be its consequence.
    rank, kind, message = next((each for each in failures if each[1] == UserError.__name__), failures[0])
    if error is None:
        error = (
            UserError(message)
            if kind == UserError.__name__
            else RankError(f"{what} failed on rank {rank}: {kind}: {message}")
        )
    if isinstance(error, UserError):
        rank_zero = reports[0] or (kind, message)
        error.agreed = _has_rank_zero(group) and rank_zero == (UserError.__name__, str(error))
    raise error


@contextmanager
def lost_ranks_as_user_errors(what: str) -> Iterator[None]:
    """Converts the error that a collective raises when another process has ended into a one-line UserError. The cause
    is in the output of that process."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise UserError(_lost_rank_message(what, error)) from error


def _lost_rank_message(what: str, error: RuntimeError) -> str:
    # torchrun sends SIGTERM as soon as one rank has failed; the others still name it.
    interrupts.ignore()
    # gloo messages start with a location in its source code and end with advice.
    reason = re.sub(r"^\[.*?\] |\. .*", "", (str(error).splitlines() or [type(error).__name__])[0])
    if lost := heartbeat.lost_ranks():
        return f"{what}: {lost} ({reason}); rerun the same command"
    return (
        f"{what}: another process of this run has ended or does not respond ({reason}); check its output for the "
        "cause, then rerun the same command"
    )


def on_every_rank(what: str, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `work` on every rank and returns its result; if it fails on any rank, all ranks raise before any barrier.

    File errors of the operating system are raised as UserError.
    """
    error: BaseException | None = None
    result: Result | None = None
    try:
        result = work()
    except OSError as caught:
        error = to_user_error(caught) or caught
        error.__cause__ = caught if error is not caught else caught.__cause__
    except Exception as caught:
        error = caught
    all_ranks_ok(error, what, group)
    return result  # type: ignore[return-value]


def on_rank_zero(what: str, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result | None:
    """Runs `work` on the group's first rank only; the other ranks wait, return None, and raise if it fails."""
    return on_every_rank(what, lambda: work() if dist.get_rank(group) == 0 else None, group)


def from_rank_zero(what: str, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `work` on the group's first rank only; returns its (pickled) result, or raises its failure, on all ranks."""
    result: list[Result | None] = [on_rank_zero(what, work, group)]
    group = group or control_group()
    dist.broadcast_object_list(result, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return result[0]  # type: ignore[return-value]


def _has_rank_zero(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_global_rank(group, 0) == 0
