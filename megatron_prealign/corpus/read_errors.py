"""Errors in input files: an exception with a location and a reason, and the list of skipped documents and files."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_prealign.errors import UserError

OnError = Literal["stop", "skip"]

# Enough to show a pattern; bounds the memory for a broken file of millions of lines.
MAX_LISTED = 100


@dataclass(frozen=True)
class Problem:
    """A skipped document or file."""

    where: str
    """File and line, or the file."""
    why: str
    """Reason."""


@dataclass
class Problems:
    """Skipped documents and files: all are counted, the first `MAX_LISTED` are listed."""

    count: int = 0
    listed: list[Problem] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Counts a problem, and lists it unless the list is full."""
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(Problem(where, why))

    def extend(self, other: "Problems") -> None:
        """Appends the problems of `other`."""
        self.count += other.count
        self.listed.extend(other.listed[: MAX_LISTED - len(self.listed)])


class ReadError(UserError):
    """A problem in an input file, with location and reason as separate fields so that it can be listed."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why

    def __reduce__(self) -> tuple[type["ReadError"], tuple[str, str]]:
        # Exceptions pickle by `args`, here the joined message; both parts must survive the way from a worker process.
        return ReadError, (self.where, self.why)
