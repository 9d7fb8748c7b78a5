"""Flushes files and directory entries to disk."""

import errno
import os
from pathlib import Path

# Errors from file systems that cannot sync a directory.
_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}


def sync_file(path: Path) -> None:
    """Flushes the content of a file to disk, so that it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Flushes new, renamed and removed directory entries to disk. Does nothing on file systems without support."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        # A directory can be writable without being readable.
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Flushes a file, or a directory with all its content."""
    if not path.is_dir():
        sync_file(path)
        return
    for directory, _, names in os.walk(path):
        for name in names:
            sync_file(Path(directory, name))
        sync_directory(Path(directory))
