"""Writes files so that a reader sees all of one or nothing: temporary names, synced, then a rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.files.sync import sync_file, sync_folder


@contextmanager
def write_atomically(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside `target`; syncs it and renames it onto `target` if the block ends well, else
    removes it.

    Works for a file and for a new folder. On any error, also Ctrl-C, nothing is left behind.
    """
    with write_all_atomically([target]) as (temporary,):
        yield temporary


@contextmanager
def write_all_atomically(targets: list[Path]) -> Iterator[list[Path]]:
    """Like `write_atomically` for files that belong together: none is renamed before all are written and synced.

    The renames happen in the order of `targets`: name the file that tells a reader that the others are there last. Of
    several, an older last one is removed before the first rename: whenever the process is killed, the last file stands
    beside its own companions or is missing.
    """
    temporaries = [target.with_name(f".{target.name}.{os.getpid()}.tmp") for target in targets]
    try:
        yield temporaries
        for temporary in temporaries:
            _sync_all(temporary)
        if len(targets) > 1:
            targets[-1].unlink(missing_ok=True)
            sync_folder(targets[-1].parent)
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
        for folder in {target.parent for target in targets}:
            sync_folder(folder)
    finally:
        for temporary in temporaries:
            if temporary.is_dir():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink(missing_ok=True)


def _sync_all(path: Path) -> None:
    """Syncs a file, or a folder with all that is in it."""
    if not path.is_dir():
        sync_file(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


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
