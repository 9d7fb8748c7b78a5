"""One rank's failure reaches every rank; without one, everyone gets the result."""

import pytest
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


def answer_of_rank_zero(fail: bool, halves: bool) -> tuple[dict[str, float], int]:
    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import from_rank_zero

    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if halves else [None]
    calls = []

    def work() -> dict[str, float]:
        calls.append(1)
        if fail:
            raise UserError("the data is gone")
        return {"rank": dist.get_rank() + 0.1}

    return from_rank_zero("measuring", work, groups[dist.get_rank() // 2 if halves else 0]), len(calls)


def work_in_halves(failing: int) -> tuple[int | None, str | None]:
    """Ranks 0,1 and 2,3 agree among themselves; `failing` fails in its half."""
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


def wait_for_rank_zero(patience_s: float | None, work_s: float) -> str:
    """Rank 0 works for longer than the default group's timeout; the others wait over the control group, if any."""
    import time
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_prealign.runtime.agreement import on_rank_zero, open_control_group

    # Gloo takes its timeout when a group is made, so the short default is one made here.
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


def test_results_come_back_where_nothing_fails(workers: WorkerPool) -> None:
    assert workers.run(2, work_on_every_rank, (), ()) == [10, 11]


@pytest.mark.parametrize("failing", [0, 1])
def test_users_mistake_of_one_rank_is_everyones(workers: WorkerPool, failing: int) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, work_on_every_rank, (failing,), (), timeout_s=30)
    assert failures(caught) == dict.fromkeys((0, 1), ("UserError", f"no file on rank {failing}"))


def test_other_errors_stay_with_their_rank_and_are_told_to_the_others(workers: WorkerPool) -> None:
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


def test_rank_zero_works_alone(workers: WorkerPool) -> None:
    assert workers.run(2, work_on_rank_zero, False) == [(5, 1), (None, 0)]
    with pytest.raises(WorkerError) as caught:
        workers.run(2, work_on_rank_zero, True, timeout_s=30)
    assert failures(caught) == dict.fromkeys((0, 1), ("UserError", "the disk is full"))


def test_answer_of_rank_zero_reaches_all(workers: WorkerPool) -> None:
    assert workers.run(2, answer_of_rank_zero, False, False) == [({"rank": 0.1}, 1), ({"rank": 0.1}, 0)]
    answers = workers.run(4, answer_of_rank_zero, False, True)
    assert answers == [({"rank": 0.1}, 1), ({"rank": 0.1}, 0), ({"rank": 2.1}, 1), ({"rank": 2.1}, 0)]
    with pytest.raises(WorkerError) as caught:
        workers.run(2, answer_of_rank_zero, True, False, timeout_s=30)
    assert failures(caught) == dict.fromkeys((0, 1), ("UserError", "the data is gone"))


def test_groups_agree_among_themselves(workers: WorkerPool) -> None:
    told = "RankError: working failed on rank 1: ValueError: broken"
    assert workers.run(4, work_in_halves, 3, timeout_s=60) == [
        (0, None),
        (None, None),
        (2, told),
        (None, "ValueError: broken"),
    ]


def test_rank_zero_is_known_to_say_it(workers: WorkerPool) -> None:
    assert workers.run(2, agreed_errors, {1: "gone"}, timeout_s=30) == [("gone", True)] * 2
    assert workers.run(2, agreed_errors, {0: "gone", 1: "gone"}, timeout_s=30) == [("gone", True)] * 2
    # Rank 0 says something else: rank 1 must speak for itself.
    answers = workers.run(2, agreed_errors, {0: "gone", 1: "damaged"}, timeout_s=30)
    assert answers == [("gone", True), ("damaged", False)]


def test_file_that_the_system_refuses_one_rank_is_everyones_mistake(workers: WorkerPool) -> None:
    with pytest.raises(WorkerError) as caught:
        workers.run(2, open_a_missing_file, 1, timeout_s=30)
    for kind, message in failures(caught).values():
        assert kind == "UserError"
        assert message.startswith("/no/such/file: No such file or directory (FileNotFoundError); check this path")


def test_control_group_outlasts_the_timeout_of_a_collective(workers: WorkerPool) -> None:
    # 1 s is the timeout without it; 2.5 s of work is clearly longer, 60 s of patience clearly enough.
    assert workers.run(2, wait_for_rank_zero, 60.0, 2.5, timeout_s=60) == ["done", "done"]
    told = workers.run(2, wait_for_rank_zero, None, 2.5, timeout_s=60)[1]
    assert told.startswith("building: another process of this run has ended or does not answer (Timed out waiting ")


def test_control_group_of_a_group_that_is_gone_is_not_used(workers: WorkerPool) -> None:
    workers.run(2, wait_for_rank_zero, 60.0, 0.0, timeout_s=60)
    assert workers.run(2, work_on_every_rank, (), ()) == [10, 11]
