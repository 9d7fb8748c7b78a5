"""Prepares the input of the next step in a thread while the device works on this one."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.profiler import record_function

Key = TypeVar("Key")
Value = TypeVar("Value")

# A disk that no longer responds must not keep a run from ending; the thread ends with the process.
_CLOSE_WITHIN_S = 10.0


@dataclass(frozen=True, eq=False)
class _Reading(Generic[Key, Value]):
    key: Key
    thread: threading.Thread
    result: "Future[Value]"


class ReadAhead(Generic[Key, Value]):
    """Calls a function of a step in a thread, at most one step ahead.

    The function must depend on its argument only, so a value that was read ahead equals one read on demand. An error is
    raised by `take`, at the step that it belongs to.

    On CUDA the thread copies and computes in a stream of its own, for which `take` makes the caller's stream wait.
    """

    def __init__(self, name: str, read: Callable[[Key], Value], device: torch.device) -> None:
        """
        Args:
            name: What is read, for the thread and for profiles.
            read: Called in the thread, never twice at a time.
            device: Device of the tensors in the values.
        """
        self._name = name
        self._read = read
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._next: _Reading[Key, Value] | None = None
        self._taken: Value | None = None
        self._waited_s = 0.0

    def take(self, key: Key, *, following: Key | None) -> Value:
        """Returns the value of `key`, read ahead or now, and starts reading `following`; None to read nothing."""
        start_s = time.perf_counter()
        with record_function(f"wait for {self._name}"):
            if self._next is None or self._next.key != key:
                self._start(key)
            assert self._next is not None
            reading, self._next = self._next, None
            reading.thread.join()
            value = reading.result.result()
        self._waited_s += time.perf_counter() - start_s
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        # Releases the last value only now. Its memory belongs to the thread's stream, whose next work waits for all
        # that the caller's stream has been given so far (`_start`), including the last use of the value.
        self._taken = value
        if following is not None:
            self._start(following)
        return value

    def _start(self, key: Key) -> None:
        if self._next is not None:
            # Read for a step that did not come.
            self._next.thread.join()
        result: Future[Value] = Future()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

        def work() -> None:
            # The stream of a thread is the default one, whatever that of its parent; this also sets the device.
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                try:
                    result.set_result(self._read(key))
                except BaseException as error:
                    result.set_exception(error)

        thread = threading.Thread(target=work, name=f"read-{self._name}", daemon=True)
        self._next = _Reading(key, thread, result)
        thread.start()

    def drain_waited_s(self) -> float:
        """Seconds that `take` has waited for the thread since the last call."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def close(self) -> None:
        """Drops what was read ahead and waits until the thread has ended."""
        if self._next is not None:
            self._next.thread.join(_CLOSE_WITHIN_S)
        self._next = self._taken = None
