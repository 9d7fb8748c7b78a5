"""Work that one rank does for all, without the others waiting for ever when it fails.

Where no group is given, the ranks agree over the run's control group, which `runtime.distributed.start` makes: gloo
with a timeout of its own, since one rank may build an index or write a checkpoint for longer than any collective of the
training may take.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_prealign.errors import UserError, user_error_of

Result = TypeVar("Result")

# The default group it was made in, itself, and its timeout. It is good as long as that default group is the one in use.
_control: tuple[dist.ProcessGroup, dist.ProcessGroup, timedelta] | None = None


class RankError(RuntimeError):
    """Another rank failed; its message is carried along."""


def open_control_group(timeout: timedelta) -> None:
    """Makes the group that the ranks agree over, or keeps one that waits as long. Takes part: all ranks."""
    global _control
    world = dist.group.WORLD
    assert world is not None, "the process group is not there yet"
    if _control is None or _control[0] is not world or _control[2] < timeout:
        _control = (world, dist.new_group(backend="gloo", timeout=timeout), timeout)


def control_group() -> dist.ProcessGroup | None:
    """The group that the ranks agree over; None, torch's default group, where a run has not made one."""
    return _control[1] if _control is not None and _control[0] is dist.group.WORLD else None


def all_ranks_ok(error: BaseException | None, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Every rank calls this with its own error or None; all raise if any rank has one.

    Takes part: all ranks of `group` (two collectives only when something failed, one otherwise).

    Raises:
        UserError: some rank met a user's mistake (the first such rank's message). It is `agreed` where rank 0 raises
            the same. Or a rank has ended.
        RankError: some other rank failed otherwise. The failing rank raises its own error.
    """
    group = group or control_group()
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    failed = torch.tensor([0 if error is None else 1], device=device)
    try:
        dist.all_reduce(failed, group=group)
    except RuntimeError as lost:
        if error is not None:
            raise error from lost
        raise UserError(_lost(what, lost)) from lost
    if int(failed) == 0:
        return
    reports: list[tuple[str, str] | None] = [None] * dist.get_world_size(group)
    own = None if error is None else (type(error).__name__, str(error))
    dist.all_gather_object(reports, own, group=group)
    told = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
    # A mistake that the user can mend explains more than a failure that may have come of it.
    rank, kind, message = next((each for each in told if each[1] == UserError.__name__), told[0])
    if error is None:
        error = (
            UserError(message)
            if kind == UserError.__name__
            else RankError(f"{what} failed on rank {rank}: {kind}: {message}")
        )
    if isinstance(error, UserError):
        speaker = reports[0] or (kind, message)
        error.agreed = _has_rank_zero(group) and speaker == (UserError.__name__, str(error))
    raise error


@contextmanager
def lost_ranks_as_user_errors(what: str) -> Iterator[None]:
    """Turns what a collective raises when another process has ended into one line: the cause is in the output of that
    process."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        raise UserError(_lost(what, error)) from error


def _lost(what: str, error: RuntimeError) -> str:
    # gloo begins with the place in its own source.
    reason = re.sub(r"^\[.*?\] ", "", (str(error).splitlines() or [type(error).__name__])[0])
    return (
        f"{what}: another process of this run has ended or does not answer ({reason}); its own output says why, start "
        "the same command again"
    )


def on_every_rank(what: str, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `work` on every rank and returns its result; if it fails anywhere, all ranks raise before any barrier.

    A file that the operating system refuses is a user's mistake.
    """
    error: BaseException | None = None
    result: Result | None = None
    try:
        result = work()
    except OSError as caught:
        error = user_error_of(caught) or caught
        error.__cause__ = caught if error is not caught else caught.__cause__
    except Exception as caught:
        error = caught
    all_ranks_ok(error, what, group)
    return result  # type: ignore[return-value]


def on_rank_zero(what: str, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result | None:
    """Runs `work` on the group's first rank only; the others wait and learn of a failure. Returns None on the
    others."""
    return on_every_rank(what, lambda: work() if dist.get_rank(group) == 0 else None, group)


def from_rank_zero(what: str, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `work` on the group's first rank only; its result, which is pickled, or its failure reaches all ranks."""
    answer: list[Result | None] = [on_rank_zero(what, work, group)]
    group = group or control_group()
    dist.broadcast_object_list(answer, src=0 if group is None else dist.get_global_rank(group, 0), group=group)
    return answer[0]  # type: ignore[return-value]


def _has_rank_zero(group: dist.ProcessGroup | None) -> bool:
    return group is None or dist.get_global_rank(group, 0) == 0
