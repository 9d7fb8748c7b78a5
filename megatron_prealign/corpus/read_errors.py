"""What is wrong with an input: one error with its place, and the list of what was passed over."""

from dataclasses import dataclass, field
from typing import Literal

from megatron_prealign.errors import UserError

OnError = Literal["stop", "skip"]

# Enough to see a pattern; a broken file of millions of lines must not fill the memory.
MAX_LISTED = 100


@dataclass(frozen=True)
class Problem:
    """One document or file that was passed over."""

    where: str
    """`file:line`, or the file alone."""
    why: str
    """What was wrong with it."""


@dataclass
class Problems:
    """What was passed over: all counted, the first `MAX_LISTED` listed."""

    count: int = 0
    listed: list[Problem] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        """Counts one problem and lists it while there is room."""
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(Problem(where, why))

    def extend(self, other: "Problems") -> None:
        """Adds the problems of `other` behind these."""
        self.count += other.count
        self.listed.extend(other.listed[: MAX_LISTED - len(self.listed)])


class ReadError(UserError):
    """A problem in an input file, kept apart in place and reason so that it can be listed."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")
        self.where = where
        self.why = why

    def __reduce__(self) -> tuple[type["ReadError"], tuple[str, str]]:
        # Exceptions pickle by their `args`, the one joined message; worker processes must hand both parts back.
        return ReadError, (self.where, self.why)
