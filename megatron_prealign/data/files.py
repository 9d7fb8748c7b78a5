"""Writes files so that a reader sees all of one or nothing: temporary names, then a rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from megatron_prealign.errors import UserError


@contextmanager
def write_atomically(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside `target`; renames it onto `target` if the block ends well, else removes it.

    Works for a file and for a new folder. On any error, also Ctrl-C, nothing is left behind.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def write_all_atomically(targets: list[Path]) -> Iterator[list[Path]]:
    """Like `write_atomically` for files that belong together: none is renamed before all are written.

    The renames themselves happen in the order of `targets`: name the file that tells a reader that the others are there
    last.
    """
    with ExitStack() as stack:
        # The stack ends its blocks from the last entered to the first.
        yield [stack.enter_context(write_atomically(target)) for target in reversed(targets)][::-1]


def make_folder(folder: Path, what: str) -> None:
    """Makes `folder` and its parents.

    Args:
        what: the option that named it, for the message.

    Raises:
        UserError: it cannot be made: a file is in the way, or the disk or the permissions refuse.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{what}: the folder {folder} cannot be made ({error.strerror}); choose another path"
        ) from error
