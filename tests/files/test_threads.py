"""A block that ends with an error ends the work of its threads."""

import threading
from concurrent.futures import Future

import pytest

from megatron_prealign.files.threads import StoppedError, stoppable_threads


def test_work_is_finished_without_an_error() -> None:
    with stoppable_threads(2) as (pool, check):
        futures = [pool.submit(lambda number: check() or number, number) for number in range(10)]
    assert [future.result() for future in futures] == list(range(10))


def test_an_error_drops_waiting_work_and_stops_the_rest() -> None:
    begun = threading.Event()
    futures: list[Future[None]] = []

    def work(check: object) -> None:
        begun.set()
        while True:
            assert callable(check)
            check()

    with pytest.raises(KeyboardInterrupt), stoppable_threads(1) as (pool, check):
        futures += [pool.submit(work, check) for _ in range(3)]
        assert begun.wait(10)
        raise KeyboardInterrupt
    assert isinstance(futures[0].exception(), StoppedError)
    assert [future.cancelled() for future in futures] == [False, True, True]
