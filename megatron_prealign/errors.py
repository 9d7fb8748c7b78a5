"""The one error type for what a user can fix, and what an error of the operating system means for the user."""

import errno
import os
import re
from collections.abc import Iterable

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a disk, a quota or a file-size limit that is used up."""
DISK_ERRORS = DISK_FULL | {errno.EROFS, errno.EIO}
"""Error numbers that are about the disk written to, whatever was being done."""
# Libraries written in Rust (safetensors, tokenizers) carry the error number in their text alone.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")


class UserError(Exception):
    """An error in the user's files, recipe or command line.

    The command line prints it as one line without a traceback and exits with status 2, so the message itself must say
    what is wrong, where, what was found, what was expected and what to do.
    """

    exit_status = 2
    agreed = False
    """Whether rank 0 prints this same message, so that the other ranks need not."""


def user_error_of(error: OSError) -> UserError | None:
    """The error of the operating system as a line for the user; None where it names no file and is about no disk: that
    is a bug of this package."""
    if error.strerror is None:
        return None
    if error.filename is None:
        # Writing to a file that is open does not say which one it is.
        return write_error("output", error.errno) if error.errno in DISK_ERRORS else None
    return UserError(
        f"{error.filename}: {error.strerror} ({type(error).__name__}); check this path, its permissions and free disk "
        "space"
    )


def write_error(what: object, number: int | None, *, kept: str = "") -> UserError:
    """The line about something that cannot be written.

    Args:
        what: Path, or words for what was written.
        number: Error number of the operating system; None if it is not known.
        kept: What became of what was there or was begun, for the user.
    """
    reason = "unknown error" if number is None else os.strerror(number)
    advice = "free disk space" if number in DISK_FULL else "check permissions"
    return UserError(f"cannot write {what}: {reason}; {kept}{'; ' if kept else ''}{advice} or choose another path")


def shortened(items: Iterable[str], most: int = 20, separator: str = ", ") -> str:
    """The first `most` items in a line, and how many more there are."""
    items = list(items)
    rest = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return separator.join([*items[:most], *rest])


def system_errno(error: BaseException | None) -> int | None:
    """Error number of the operating system behind an error that a library may have wrapped into its own (torch in a
    RuntimeError); None if it was something else."""
    if found := _RUST_ERROR.search(str(error)):
        return int(found[1])
    while isinstance(error, OSError | RuntimeError):
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        error = error.__cause__ or error.__context__
    return None
