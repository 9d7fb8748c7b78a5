"""The one error type for mistakes a user can make and mend."""

import errno


class UserError(Exception):
    """A mistake in the user's files, recipe or command line.

    The command line prints it as one line without a traceback and exits with status 2, so the message itself must say
    what is wrong, where, what was found, what was expected and what to do.
    """

    exit_status = 2
    agreed = False
    """Whether rank 0 prints this same message, so that the other ranks need not."""


def user_error_of(error: OSError) -> UserError | None:
    """What the operating system refused as a line for the user; None where it names no file and is about no disk, which
    is for us to mend."""
    if error.strerror is None:
        return None
    if error.filename is None:
        # Writing to a file that is open does not say which one it is.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            return None
        return UserError(
            f"the output cannot be written ({error.strerror}); make room on its disk, or choose another place for it"
        )
    return UserError(
        f"{error.filename}: {error.strerror} ({type(error).__name__}); check this path, its permissions and the space "
        "left on its disk"
    )


def system_reason(error: BaseException | None) -> str | None:
    """What the operating system refused, behind an error that a library may have wrapped into its own; None if it was
    something else."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        error = error.__cause__ or error.__context__
    return None
