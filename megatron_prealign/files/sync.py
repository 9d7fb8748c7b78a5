"""Waits until files and the names of files are on the disk."""

import errno
import os
from pathlib import Path

# File systems that cannot sync a directory say so with one of these.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}


def sync_file(path: Path) -> None:
    """Waits until the content of a file is on the disk, so that it survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Waits until the names in a directory, new, renamed or removed ones, are on the disk. Does nothing on file systems
    that cannot."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        # One may write into a directory and yet not list it.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Syncs a file, or a directory with everything in it."""
    if not path.is_dir():
        sync_file(path)
        return
    for directory, _, names in os.walk(path):
        for name in names:
            sync_file(Path(directory, name))
        sync_directory(Path(directory))
