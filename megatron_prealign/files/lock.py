"""File locks that are released when their process exits, and exclusive locks on run directories."""

import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import make_directories, remove_empty

logger = logging.getLogger(__name__)

LOCK = ".run.lock"
_LOCKED = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockHeldError(Exception):
    """Another process holds the lock; the message identifies it."""


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[OSError | None]:
    """Holds an exclusive lock on the file `path` until the block ends or the process dies.

    The file is created and afterwards removed.

    Args:
        path: The lock file; its directory must exist.
        wait: Wait until another process releases the lock instead of raising immediately.

    Yields:
        None while the lock is held; the operating system error if the file system does not support locks, in which
        case nothing is locked.

    Raises:
        LockHeldError: Another process holds the lock and `wait` is not set.
        OSError: The file cannot be created.
    """
    file, unsupported = _lock(path, wait)
    try:
        yield unsupported
    finally:
        if file is not None:
            with file:
                # Its directory may have been removed, and another process may have created both again.
                if _is_same_file(path, file):
                    path.unlink()


@contextmanager
def locked_directories(directories: Sequence[Path]) -> Iterator[None]:
    """Locks directories for one run until the block ends or the process dies; missing ones are created.

    Created directories that are still empty are removed again. If the file system does not support locks, this only
    logs a warning.

    Raises:
        UserError: Another process holds a lock.
        OSError: A directory cannot be written.
    """
    with ExitStack() as stack:
        for directory in dict.fromkeys(directory.resolve() for directory in directories):
            stack.callback(remove_empty, make_directories(directory))
            try:
                unsupported = stack.enter_context(file_lock(directory / LOCK, wait=False))
            except LockHeldError as error:
                raise UserError(
                    f"{directory} is in use by another run ({error}); wait for it, stop it, or set another "
                    "logging.run_dir and checkpoint.directory"
                ) from error
            if unsupported is not None:
                logger.warning(
                    "%s: the file system does not support locks (%s); make sure that no other run writes there",
                    directory,
                    unsupported,
                )
        yield


def _lock(path: Path, wait: bool) -> tuple[IO[str] | None, OSError | None]:
    """Returns the locked file, or the error of a file system without locks."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _LOCKED:
                holder = _holder(path)
                file.close()
                raise LockHeldError(holder) from error
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None, error
        if _is_same_file(path, file):
            break
        # Removed by its holder between open and flock; another process may have created a new one.
        file.close()
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
    # A full disk must not prevent locking: the cleanup that frees it runs under this lock.
    with suppress(OSError):
        file.truncate(0)
        os.write(file.fileno(), holder.encode())
    return file, None


def _is_same_file(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # The holder has locked the file but not yet written its name.
        return "unknown process"
