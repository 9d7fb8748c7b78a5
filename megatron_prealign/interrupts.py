"""Signals that end a command: SIGINT (Ctrl-C), SIGTERM and SIGHUP raise KeyboardInterrupt, but not inside an import.

Libraries catch everything while they are imported (`try: import x` / `except: x = None`) and then continue without a
part of themselves, or fail later. So a signal that arrives during an import is raised when the import is over.
"""

import os
import signal
import sys
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RETRY_S = 0.05
_handled_by: int | None = None
"""Process whose signals are handled."""


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
        Whether this process handles signals; otherwise nothing changes.
    """
    if _handled_by != os.getpid():
        return False
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return True


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
