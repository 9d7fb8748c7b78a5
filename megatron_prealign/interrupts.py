"""Signals that end a command: SIGINT (Ctrl-C), SIGTERM and SIGHUP raise KeyboardInterrupt, but not inside an import.

Libraries catch everything while they are imported (`try: import x` / `except: x = None`) and then continue without a
part of themselves, or fail later. So a signal that arrives during an import is raised when the import is over.

Python handles a signal between two of its own instructions, and so not before native code returns. `run_native` runs
native code that takes minutes in a thread, and waits for it where a signal is handled.
"""

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from types import FrameType
from typing import TypeVar

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RETRY_S = 0.05
# The kernel may deliver a signal to another thread, and then it does not end a wait of this one.
_POLL_S = 0.1
_CHUNK_ITEMS = 32
_CHUNKS_AHEAD = 2

Item = TypeVar("Item")
Result = TypeVar("Result")

_handled_by: int | None = None
"""Process whose signals are handled."""
_abandoned: list[threading.Thread] = []
"""Threads of interrupted calls of `run_native`."""


def handle() -> None:
    """Handles signals in this process from now on; those that it was started to ignore (nohup) stay ignored."""
    global _handled_by
    _handled_by = os.getpid()
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)
    signal.signal(signal.SIGALRM, _receive)
    sys.unraisablehook = _retry_unraisable


def ignore() -> bool:
    """Ignores the signals from now on, because the command ends anyway.

    Returns:
        Whether this process handles signals, in this thread; otherwise nothing changes.
    """
    if not _is_handled_here():
        return False
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return True


def run_native(call: Callable[[Iterator[Item]], Result], items: Iterator[Item]) -> Result:
    """Returns `call(items)`, for native code that runs for long and releases the GIL.

    In a command, a signal or an error of `items` ends this function at once. The native code then runs on without
    effect until the process ends, see `leave`. Elsewhere the call is an ordinary one.

    Args:
        call: runs in another thread.
        items: are read in this thread.
    """
    if not _is_handled_here():
        return call(items)
    chunks: queue.Queue[list[Item]] = queue.Queue(_CHUNKS_AHEAD)
    outcome: Future[Result] = Future()

    def received() -> Iterator[Item]:
        while chunk := chunks.get():
            yield from chunk

    def work() -> None:
        try:
            outcome.set_result(call(received()))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        chunk = list(islice(items, _CHUNK_ITEMS))
        while not outcome.done():
            with suppress(queue.Full):
                chunks.put(chunk, timeout=_POLL_S)
                if not chunk:
                    break
                # An empty chunk is the end.
                chunk = list(islice(items, _CHUNK_ITEMS))
        while not outcome.done():
            thread.join(_POLL_S)
        return outcome.result()
    finally:
        if not outcome.done():
            _abandoned.append(thread)


def leave(status: int) -> None:
    """Ends the process if an interrupted `run_native` still runs: the interpreter cannot be finalised under it."""
    if any(thread.is_alive() for thread in _abandoned):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _is_handled_here() -> bool:
    return _handled_by == os.getpid() and threading.current_thread() is threading.main_thread()


def _receive(number: int, frame: FrameType | None) -> None:
    if _handled_by != os.getpid():
        # A forked process inherits this handler.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    elif _is_importing(frame):
        _retry()
    else:
        raise KeyboardInterrupt


def _retry() -> None:
    # A timer and not a thread: the interrupted code may hold the locks that starting a thread needs.
    signal.setitimer(signal.ITIMER_REAL, _RETRY_S)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _retry_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """An exception in `__del__` or in a callback of the garbage collector is lost; an interrupt must not be."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _retry()
    else:
        sys.__unraisablehook__(unraisable)
