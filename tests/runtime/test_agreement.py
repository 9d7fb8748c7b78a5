"""A failure on one rank is raised on every rank; otherwise every rank gets its result."""

import pytest
from support.messages import assert_facts
from support.workers import WorkerError, WorkerPool

from megatron_prealign.errors import UserError


def work_on_every_rank(user_errors: tuple[int, ...], other_errors: tuple[int, ...]) -> int:
    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import on_every_rank

    rank = dist.get_rank()

    def work() -> int:
        if rank in user_errors:
            raise UserError(f"no file on rank {rank}")
        if rank in other_errors:
            raise ZeroDivisionError(f"oops on rank {rank}")
        return 10 + rank

    return on_every_rank("opening the data", work)


def work_on_rank_zero(fail: bool) -> tuple[int | None, int]:
    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import on_rank_zero

    calls = []

    def work() -> int:
        calls.append(dist.get_rank())
        if fail:
            raise UserError("the disk is full")
        return 5

    return on_rank_zero("preparing the directory", work), len(calls)


def result_of_rank_zero(fail: bool, halves: bool) -> tuple[dict[str, float], int]:
    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import from_rank_zero

    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if halves else [None]
    calls = []

    def work() -> dict[str, float]:
        calls.append(1)
        if fail:
            raise UserError("the data is missing")
        return {"rank": dist.get_rank() + 0.1}

    return from_rank_zero("measuring", work, groups[dist.get_rank() // 2 if halves else 0]), len(calls)


def work_in_halves(failing: int) -> tuple[int | None, str | None]:
    """Ranks 0,1 and 2,3 form separate groups; `failing` fails in its group."""
    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import RankError, on_every_rank, on_rank_zero

    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    rank = dist.get_rank()
    half = halves[rank // 2]

    def work() -> None:
        if rank == failing:
            raise ValueError("broken")

    caught = None
    try:
        on_every_rank("working", work, half)
    except (ValueError, RankError) as error:
        caught = f"{type(error).__name__}: {error}"
    return on_rank_zero("asking", lambda: rank, half), caught


def agreed_errors(messages: dict[int, str]) -> tuple[str, bool]:
    """The message that each rank raises, and whether rank 0 raises the same."""
    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import all_ranks_ok

    rank = dist.get_rank()
    try:
        all_ranks_ok(UserError(messages[rank]) if rank in messages else None, "opening the data")
    except UserError as error:
        return str(error), error.agreed
    return "", False


def open_a_missing_file(failing: int) -> None:
    from pathlib import Path

    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import on_every_rank

    on_every_rank("reading", lambda: Path("/no/such/file").read_text() if dist.get_rank() == failing else "")


def allocate_too_much(failing: int, library: str) -> None:
    import numpy as np
    import torch
    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import on_every_rank

    def work() -> None:
        if dist.get_rank() == failing:
            np.empty(10**15) if library == "numpy" else torch.empty(1 << 50)

    on_every_rank("reading", work)


def wait_for_rank_zero(patience_s: float | None, work_s: float) -> str:
    """Rank 0 works for longer than the default group's timeout; the others wait over the control group, if there is
    one."""
    import time
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import on_rank_zero, open_control_group

    # Gloo fixes its timeout when a group is created, so this group stands in for a short default.
    short = dist.new_group(timeout=timedelta(seconds=1))
    if patience_s is not None:
        open_control_group(timedelta(seconds=patience_s))
    try:
        on_rank_zero("building", lambda: time.sleep(work_s), None if patience_s is not None else short)
    except UserError as error:
        return str(error)
    return "done"


def failures(caught: pytest.ExceptionInfo[WorkerError]) -> dict[int, tuple[str, str]]:
    return {rank: (kind, message) for rank, (kind, message, _) in caught.value.failures.items()}


def test_every_rank_gets_its_result(workers: WorkerPool) -> None:
    assert workers.run(2, work_on_every_rank, (), ()) == [10, 11]


@pytest.mark.parametrize("failing", [0, 1])
def test_user_error_of_one_rank_is_raised_on_all(workers: WorkerPool, failing: int) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, work_on_every_rank, (failing,), (), timeout_s=30)
    assert failures(caught) == dict.fromkeys((0, 1), ("UserError", f"no file on rank {failing}"))


def test_other_errors_are_raised_on_their_rank_and_reported_on_the_others(workers: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, work_on_every_rank, (), (1,), timeout_s=30)
    assert failures(caught) == {
        0: ("RankError", "opening the data failed on rank 1: ZeroDivisionError: oops on rank 1"),
        1: ("ZeroDivisionError", "oops on rank 1"),
    }


def test_each_failing_rank_keeps_its_own_error(workers: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, work_on_every_rank, (0,), (1,), timeout_s=30)
    assert failures(caught) == {
        0: ("UserError", "no file on rank 0"),
        1: ("ZeroDivisionError", "oops on rank 1"),
    }


def test_only_rank_zero_works(workers: WorkerPool) -> None:
    assert workers.run(2, work_on_rank_zero, False) == [(5, 1), (None, 0)]
    with pytest.raises(WorkerError) as caught:
        workers.run(2, work_on_rank_zero, True, timeout_s=30)
    assert failures(caught) == dict.fromkeys((0, 1), ("UserError", "the disk is full"))


def test_result_of_rank_zero_is_returned_on_all_ranks(workers: WorkerPool) -> None:
    assert workers.run(2, result_of_rank_zero, False, False) == [({"rank": 0.1}, 1), ({"rank": 0.1}, 0)]
    results = workers.run(4, result_of_rank_zero, False, True)
    assert results == [({"rank": 0.1}, 1), ({"rank": 0.1}, 0), ({"rank": 2.1}, 1), ({"rank": 2.1}, 0)]
    with pytest.raises(WorkerError) as caught:
        workers.run(2, result_of_rank_zero, True, False, timeout_s=30)
    assert failures(caught) == dict.fromkeys((0, 1), ("UserError", "the data is missing"))


def test_groups_are_independent(workers: WorkerPool) -> None:
    reported = "RankError: working failed on rank 1: ValueError: broken"
    assert workers.run(4, work_in_halves, 3, timeout_s=60) == [
        (0, None),
        (None, None),
        (2, reported),
        (None, "ValueError: broken"),
    ]


def test_agreed_is_true_if_rank_zero_raises_the_same_error(workers: WorkerPool) -> None:
    assert workers.run(2, agreed_errors, {1: "gone"}, timeout_s=30) == [("gone", True)] * 2
    assert workers.run(2, agreed_errors, {0: "gone", 1: "gone"}, timeout_s=30) == [("gone", True)] * 2
    # Rank 0 raises another error, so rank 1 must report its own.
    results = workers.run(2, agreed_errors, {0: "gone", 1: "corrupt"}, timeout_s=30)
    assert results == [("gone", True), ("corrupt", False)]


def test_file_error_of_one_rank_is_a_user_error_on_all(workers: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, open_a_missing_file, 1, timeout_s=30)
    for kind, message in failures(caught).values():
        assert kind == "UserError"
        assert_facts(message, "/no/such/file", "No such file or directory", "FileNotFoundError")


@pytest.mark.parametrize(("library", "fact"), [("numpy", "(1000000000000000,)"), ("torch", f"{4 << 50} bytes")])
def test_refused_memory_is_a_user_error_on_every_rank(workers: WorkerPool, library: str, fact: str) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, allocate_too_much, 1, library, timeout_s=30)
    assert len(failures(caught)) == 2
    for kind, message in failures(caught).values():
        assert kind == "UserError"
        assert_facts(message, "out of memory", fact)


@pytest.mark.slow
def test_control_group_outlasts_the_timeout_of_a_collective(workers: WorkerPool) -> None:
    # Without the control group the timeout is 1 s; 2.5 s of work is clearly longer, 60 s clearly enough.
    assert workers.run(2, wait_for_rank_zero, 60.0, 2.5, timeout_s=60) == ["done", "done"]
    message = workers.run(2, wait_for_rank_zero, None, 2.5, timeout_s=60)[1]
    assert message.startswith("building: another process of this run has ended or does not respond (Timed out waiting ")


def test_control_group_of_a_destroyed_group_is_not_used(workers: WorkerPool) -> None:
    workers.run(2, wait_for_rank_zero, 60.0, 0.0, timeout_s=60)
    assert workers.run(2, work_on_every_rank, (), ()) == [10, 11]
