"""A block that ends with an error ends the work of its threads."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

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


@pytest.fixture
def interrupted_once() -> Iterator[None]:
    """Only the first SIGINT raises KeyboardInterrupt."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)
        if len(received) == 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, receive)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupted_once")
def test_ctrl_c_while_a_finished_block_waits_for_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    main, waiting = threading.get_ident(), threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def observed(pool: ThreadPoolExecutor, **options: bool) -> None:
        waiting.set()
        shutdown(pool, **options)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", observed)

    def work(check: Callable[[], None]) -> str:
        assert waiting.wait(10)
        for _ in range(200):
            # Again and again: a signal just before the main thread waits does not end its wait.
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.01)
            check()
        return "not stopped"

    with pytest.raises(KeyboardInterrupt), stoppable_threads(1) as (pool, check):
        future = pool.submit(work, check)
    assert isinstance(future.exception(), StoppedError)
