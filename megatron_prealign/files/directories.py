"""Output directories: checked before long work, and removed again if a command fails."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from megatron_prealign.errors import UserError, system_errno, to_user_error, write_error


def make_directories(directory: Path) -> list[Path]:
    """Creates `directory` and its missing parents, all of them or none.

    Returns:
        The created directories, outermost first.

    Raises:
        UserError: A parent is a file.
        OSError: A directory cannot be created.
    """
    above = [directory, *directory.parents]
    missing = [each for each in above if not os.path.lexists(each)][::-1]
    existing = next((each for each in above if each.exists()), directory)
    if existing.exists() and not existing.is_dir():
        raise UserError(f"cannot create directory {directory}: {existing} is a file; choose another path")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        remove_empty(missing)
        raise
    return missing


def remove_empty(directories: Iterable[Path]) -> None:
    """Removes the empty ones of `directories`, listed outermost first; another process may have used some of them."""
    for directory in reversed(list(directories)):
        with suppress(OSError):
            directory.rmdir()


def check_writable(directory: Path, what: object) -> None:
    """Checks that files can be created in `directory`, which need not exist yet; leaves nothing behind.

    Creates a temporary file, since permissions alone do not cover read-only disks, root and /proc.

    Args:
        directory: The directory.
        what: The path or option named by the user, for the message.

    Raises:
        UserError: No file can be created.
    """
    created: list[Path] = []
    try:
        created = make_directories(directory)
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise write_error(what, error.errno) from error
    finally:
        remove_empty(created)


@contextmanager
def writing(path: Path, what: str = "", *, note: str = "") -> Iterator[None]:
    """Creates the parent directories of `path` and converts disk errors raised in the block to one-line user errors.

    On any error, created directories that are still empty are removed.

    Args:
        path: The output path named by the user.
        what: Kind of output, put before the path in the message.
        note: State of partial output, added to the message.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    created: list[Path] = []
    try:
        created = make_directories(path.parent)
        yield
    except BaseException as error:
        remove_empty(created)
        number = system_errno(error)
        if isinstance(error, UserError) or number is None:
            raise
        if isinstance(error, OSError) and _concerns_other_path(error, path):
            raise to_user_error(error) or error from error
        raise write_error(f"{what} {path}".strip(), number, note=note) from error


def _concerns_other_path(error: OSError, output: Path) -> bool:
    """Whether the error names a file that is neither in nor above the directory of `output`."""
    if not isinstance(error.filename, str | bytes):
        return False
    above, file = output.absolute().parent, Path(os.fsdecode(error.filename)).absolute()
    return not (above in file.parents or file == above or file in above.parents)


def check_output_file(output: str | None, *, overwrite: bool = True) -> None:
    """Checks that the output file can be created, before minutes of work.

    Raises:
        UserError: its directory does not exist, it is a directory, or it exists and `overwrite` is not set.
    """
    if output is None:
        return
    path = Path(output)
    if path.is_dir():
        raise UserError(f"--output {output} is a directory, expected a file; choose another path")
    if not path.parent.is_dir():
        raise UserError(f"--output {output}: {path.parent} is not an existing directory; choose another path")
    if path.exists() and not overwrite:
        raise UserError(f"--output {output} already exists; choose another path or use --overwrite")
