"""Reading ahead: what is read and when, errors, and that no thread is left."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_prealign.runtime import read_ahead
from megatron_prealign.runtime.read_ahead import ReadAhead

CPU = torch.device("cpu")
NAME = "test pages"


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if NAME in thread.name]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def reader(read: Callable[[int], int]) -> ReadAhead[int, int]:
    return ReadAhead(NAME, read, CPU)


def test_one_value_is_read_ahead_in_another_thread() -> None:
    started: list[int] = []
    gates = {number: threading.Event() for number in range(4)}
    in_thread: list[bool] = []

    def read(number: int) -> int:
        started.append(number)
        in_thread.append(threading.current_thread() is not threading.main_thread())
        assert gates[number].wait(10)
        return 10 * number

    ahead = reader(read)
    gates[0].set()
    assert ahead.take(0, following=1) == 0
    # The next value is being read while the caller works on this one; the one after it is not.
    gates[1].set()
    assert ahead.take(1, following=2) == 10
    assert started in ([0, 1], [0, 1, 2])
    gates[2].set()
    assert ahead.take(2, following=None) == 20
    assert started == [0, 1, 2]
    assert threads() == []
    assert all(in_thread)


def test_another_step_than_expected_is_read_on_demand() -> None:
    running: list[int] = []
    read: list[int] = []

    def alone(number: int) -> int:
        running.append(number)
        assert len(running) == 1, "two reads at a time"
        read.append(running.pop())
        return number

    ahead = reader(alone)
    assert ahead.take(0, following=1) == 0
    assert ahead.take(5, following=6) == 5
    assert ahead.take(6, following=None) == 6
    assert read == [0, 1, 5, 6]


def test_an_error_belongs_to_its_step() -> None:
    def read(number: int) -> int:
        if number == 2:
            raise ZeroDivisionError("of step 2")
        return number

    ahead = reader(read)
    assert ahead.take(1, following=2) == 1
    with pytest.raises(ZeroDivisionError, match="of step 2"):
        ahead.take(2, following=3)
    # Nothing was started for the step after the error, and an error of a step that does not come is dropped.
    assert threads() == []
    assert ahead.take(1, following=2) == 1
    assert ahead.take(7, following=2) == 7
    ahead.close()


def test_closing_drops_what_was_read_ahead() -> None:
    read: list[int] = []

    def record(number: int) -> int:
        read.append(number)
        return number

    ahead = reader(record)
    ahead.take(0, following=1)
    ahead.close()
    assert read == [0, 1]
    assert threads() == []
    assert ahead.take(1, following=None) == 1
    assert read == [0, 1, 1]


def test_a_disk_that_does_not_respond_does_not_block_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "_CLOSE_WITHIN_S", 0.01)
    responds = threading.Event()
    ahead = reader(lambda number: number if number == 0 else int(responds.wait(10)))
    ahead.take(0, following=1)
    (thread,) = threads()
    ahead.close()
    # It ends with the process.
    assert thread.is_alive() and thread.daemon
    responds.set()
    thread.join(10)


def test_waiting_is_counted_once() -> None:
    slow = threading.Event()
    ahead = reader(lambda number: int(slow.wait(0.05)))
    ahead.take(0, following=None)
    assert ahead.drain_waited_s() >= 0.05
    assert ahead.drain_waited_s() == 0.0
