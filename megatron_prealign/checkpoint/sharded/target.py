"""Where a checkpoint is written, and what is said when the disk there fails."""

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
    """Where a checkpoint is written and what messages say of it."""

    working: Path
    """Where it lies until it is complete."""
    final: Path
    """Where it will lie then."""
    previous: str | None
    """Name of the newest complete checkpoint, which stays if this one fails."""

    @contextmanager
    def disk_errors_as_user_errors(self) -> Iterator[None]:
        """Turns what a full, read-only or broken disk raises while the checkpoint is written into a `UserError`."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            reason = _disk_error(error)
            if reason is None:
                raise
            raise UserError(self.failure(reason)) from error

    def answer(self, work: Callable[[], Result], timeout_s: float) -> Result:
        """What `work` on the disk returns, in a thread that may be left behind: a disk may never answer.

        Raises:
            UserError: the disk refused, or did not answer within `timeout_s`.
        """
        answers: queue.SimpleQueue[tuple[Result | None, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put((work(), None))
            except Exception as error:
                answers.put((None, error))

        threading.Thread(target=run, name="checkpoint-disk", daemon=True).start()
        try:
            result, error = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise UserError(self.late("the file system did not answer", timeout_s)) from None
        with self.disk_errors_as_user_errors():
            if error is not None:
                raise error
        return result  # type: ignore[return-value]

    def late(self, what: str, timeout_s: float) -> str:
        """The line about a save that took too long."""
        return self.failure(f"{what} within {timeout_s:.0f} s (checkpoint.timeout_minutes)")

    def failure(self, reason: str) -> str:
        """The line about a save that failed."""
        kept = "there is none before it" if self.previous is None else f"{self.previous} is the newest complete one"
        return (
            f"checkpoint {self.final} cannot be written: {reason}; {kept}; mend the disk or choose another "
            "checkpoint.directory and start the same command again"
        )


def _disk_error(error: BaseException | None) -> str | None:
    """The reason, if `error` comes from the disk. torch reports a short write as a RuntimeError of its own."""
    short_write = "the disk took only a part of a file (is it full?)" if "PytorchStreamWriter" in str(error) else None
    number = system_errno(error)
    if number is not None:
        return os.strerror(number)
    return str(error) if isinstance(error, OSError) else short_write
