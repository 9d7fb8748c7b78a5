"""Locks on files that end with the process that holds them, and a directory locked for one run at a time."""

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
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LockHeldError(Exception):
    """Another process holds the lock; the text says which one."""


@contextmanager
def file_lock(path: Path, *, wait: bool) -> Iterator[OSError | None]:
    """Holds the lock `path`, a file that is made and afterwards removed, until the block ends or the process dies.

    Args:
        path: The file; its directory exists.
        wait: Wait until another process releases it, else raise at once.

    Yields:
        None while the lock is held; the error of the operating system where the file system has no locks, and nothing
        is held.

    Raises:
        LockHeldError: another process holds it, and `wait` is not set.
        OSError: the file cannot be made.
    """
    file, unsupported = _lock(path, wait)
    try:
        yield unsupported
    finally:
        if file is not None:
            with file:
                # Its directory may be gone, and another process may have made both anew.
                if _is_still(path, file):
                    path.unlink()


@contextmanager
def locked_directories(directories: Sequence[Path]) -> Iterator[None]:
    """Locks directories for one run, which are made if missing, until the block ends or the process dies.

    Directories that were made and are still empty are removed again. A file system without locks is only warned about.

    Raises:
        UserError: another process holds one.
        OSError: a directory cannot be written.
    """
    with ExitStack() as held:
        for directory in dict.fromkeys(directory.resolve() for directory in directories):
            held.callback(remove_empty, make_directories(directory))
            try:
                unsupported = held.enter_context(file_lock(directory / LOCK, wait=False))
            except LockHeldError as error:
                raise UserError(
                    f"{directory} is in use by another run ({error}); wait for it, stop it, or choose another "
                    "logging.run_dir and checkpoint.directory"
                ) from error
            if unsupported is not None:
                logger.warning(
                    "%s: this file system has no locks (%s); make sure that no other run writes there",
                    directory,
                    unsupported,
                )
        yield


def _lock(path: Path, wait: bool) -> tuple[IO[str] | None, OSError | None]:
    """The locked file, or the error of a file system without locks."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _HELD:
                holder = _holder(path)
                file.close()
                raise LockHeldError(holder) from error
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return None, error
        if _is_still(path, file):
            break
        # Its holder removed it between our opening and our locking: another process may have made a new one.
        file.close()
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
    # On a full disk the lock holds without a name: what fills the disk may be removed under this very lock.
    with suppress(OSError):
        file.truncate(0)
        os.write(file.fileno(), holder.encode())
    return file, None


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # Between taking the lock and saying so.
        return "process unknown"
