"""The one error type for mistakes a user can make and mend."""


class UserError(Exception):
    """A mistake in the user's files, recipe or command line.

    The command line prints it as one line without a traceback and exits with status 2, so the message itself must say
    what is wrong, where, what was found, what was expected and what to do.
    """

    exit_status = 2
