"""Writes files so that a reader sees all of one or nothing: temporary names, then a rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


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

    The renames themselves happen from the last target to the first, so name the file that makes the group valid first.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(write_atomically(target)) for target in targets]
