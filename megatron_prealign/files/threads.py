"""Threads whose work ends soon after an error or Ctrl-C."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event


class StoppedError(Exception):
    """Raised in a thread whose result is not needed any more."""


@contextmanager
def stoppable_threads(workers: int) -> Iterator[tuple[ThreadPoolExecutor, Callable[[], None]]]:
    """Yields a thread pool, and a function for its work to call now and then.

    If the block or the wait for its work ends with an error, which includes Ctrl-C, work that waits for a thread is
    dropped, and the function raises StoppedError in all other work. Python's own pool would finish everything first.
    """
    stopping = Event()

    def check() -> None:
        if stopping.is_set():
            raise StoppedError

    pool = ThreadPoolExecutor(workers)
    try:
        yield pool, check
        pool.shutdown()
    except BaseException:
        stopping.set()
        pool.shutdown(cancel_futures=True)
        raise
