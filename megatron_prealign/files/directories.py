"""Directories that a command makes: tried before long work, and gone again if the command fails."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from megatron_prealign.errors import UserError, system_errno, user_error_of, write_error


def make_directories(directory: Path) -> list[Path]:
    """Makes `directory` and its missing parents, all of them or none.

    Returns:
        Those that were missing, outermost first.

    Raises:
        UserError: a file is in the way.
        OSError: one cannot be made.
    """
    above = [directory, *directory.parents]
    missing = [each for each in above if not os.path.lexists(each)][::-1]
    existing = next((each for each in above if each.exists()), directory)
    if existing.exists() and not existing.is_dir():
        raise UserError(f"cannot make directory {directory}: {existing} is a file; choose another path")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_empty(missing)
        raise
    return missing


def remove_empty(directories: Iterable[Path]) -> None:
    """Removes those of `directories`, given outermost first, that are empty: another process may have put something
    into one."""
    for directory in reversed(list(directories)):
        with suppress(OSError):
            directory.rmdir()


def check_writable(directory: Path, what: object) -> None:
    """Checks that `directory`, which need not exist yet, takes new files; leaves nothing behind.

    Permissions alone tell too little: of a read-only disk, of root, of the kernel's own directories.

    Args:
        what: What the user named, for the message.

    Raises:
        UserError: it does not.
    """
    made: list[Path] = []
    try:
        made = make_directories(directory)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise write_error(what, error.errno) from error
    finally:
        remove_empty(made)


@contextmanager
def writing(path: Path, what: str = "", *, kept: str = "") -> Iterator[None]:
    """Makes the parent directories of `path` and turns what the disk refuses within the block into one line; then no
    directory that was made stays empty.

    Args:
        path: What the user named.
        what: What is written there, in front of the path in the message.
        kept: What became of what was begun, for the message.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    made: list[Path] = []
    try:
        made = make_directories(path.parent)
        yield
    except BaseException as error:
        remove_empty(made)
        number = system_errno(error)
        if isinstance(error, UserError) or number is None:
            raise
        if isinstance(error, OSError) and _is_about_another(error, path):
            raise user_error_of(error) or error from error
        raise write_error(f"{what} {path}".strip(), number, kept=kept) from error


def _is_about_another(error: OSError, output: Path) -> bool:
    """Whether the error names a file that has nothing to do with `output`: not in or above its directory."""
    if not isinstance(error.filename, str | bytes):
        return False
    above, file = output.absolute().parent, Path(os.fsdecode(error.filename)).absolute()
    return not (above in file.parents or file == above or file in above.parents)
