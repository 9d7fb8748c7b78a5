"""Paths of a checkpoint that is being written, and error messages for its file system."""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_prealign.errors import UserError, system_errno

Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """Paths of a checkpoint that is being written."""

    working: Path
    """Directory until the checkpoint is complete."""
    final: Path
    """Directory of the complete checkpoint."""
    previous: str | None
    """Name of the newest complete checkpoint, which is kept if this save fails; None if there is none."""

    @contextmanager
    def disk_errors_as_user_errors(self) -> Iterator[None]:
        """Turns errors of a full, read-only or broken disk into a `UserError`."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = _disk_error(error)
            if reason is None:
                raise
            raise UserError(self.failure_message(reason)) from error

    def run_with_timeout(self, work: Callable[[], Result], timeout_s: float) -> Result:
        """Runs file system work in a thread and returns its result; the thread is abandoned on timeout.

        Raises:
            UserError: the work failed with a disk error, or did not finish within `timeout_s` seconds.
        """
        results: queue.SimpleQueue[tuple[Result | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                results.put((work(), None))
            except Exception as error:
                results.put((None, error))

        threading.Thread(target=run, name="checkpoint-disk", daemon=True).start()
        try:
            result, error = results.get(timeout=timeout_s)
        except queue.Empty:
            raise UserError(self.timeout_message("the file system did not respond", timeout_s)) from None
        with self.disk_errors_as_user_errors():
            if error is not None:
                raise error
        return result  # type: ignore[return-value]

    def timeout_message(self, what: str, timeout_s: float) -> str:
        """Error message of a save that took too long."""
        return self.failure_message(f"{what} within {timeout_s:.0f} s (checkpoint.timeout_minutes)")

    def failure_message(self, reason: str) -> str:
        """Error message of a save that failed."""
        return (
            f"cannot write checkpoint {self.final}: {reason}; last complete checkpoint: {self.previous or 'none'}; fix "
            "the disk or set checkpoint.directory, then rerun the same command"
        )


def _disk_error(error: BaseException | None) -> str | None:
    """Reason of a disk error; None if `error` is something else. torch reports a short write as a RuntimeError."""
    short_write = "a file was written only in part (is the disk full?)" if "PytorchStreamWriter" in str(error) else None
    number = system_errno(error)
    if number is not None:
        return os.strerror(number)
    return str(error) if isinstance(error, OSError) else short_write
