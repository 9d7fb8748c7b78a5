"""Work that one rank does for all, without the others waiting for ever when it fails."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_prealign.errors import UserError

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Another rank failed; its message is carried along."""


def all_ranks_ok(error: BaseException | None, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Every rank calls this with its own error or None; all raise if any rank has one.

    Takes part: all ranks of `group` (two collectives only when something failed, one otherwise).

    Raises:
        UserError: some rank met a user's mistake (the first such rank's message).
        RankError: some other rank failed otherwise. The failing rank raises its own error.
    """
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    failed = torch.tensor([0 if error is None else 1], device=device)
    dist.all_reduce(failed, group=group)
    if int(failed) == 0:
        return
    reports: list[tuple[str, str] | None] = [None] * dist.get_world_size(group)
    own = None if error is None else (type(error).__name__, str(error))
    dist.all_gather_object(reports, own, group=group)
    if error is not None:
        raise error
    rank, report = next((rank, report) for rank, report in enumerate(reports) if report is not None)
    kind, message = report
    if kind == UserError.__name__:
        raise UserError(message)
    raise RankError(f"{what} failed on rank {rank}: {kind}: {message}")


def on_every_rank(what: str, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `work` on every rank and returns its result; if it fails anywhere, all ranks raise before any barrier."""
    error: BaseException | None = None
    result: Result | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    all_ranks_ok(error, what, group)
    return result  # type: ignore[return-value]


def on_rank_zero(what: str, work: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result | None:
    """Runs `work` on the group's first rank only; the others wait and learn of a failure. Returns None on the
    others."""
    return on_every_rank(what, lambda: work() if dist.get_rank(group) == 0 else None, group)
