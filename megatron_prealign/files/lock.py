"""One run at a time writes into a folder: a lock that ends with the process that holds it."""

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

logger = logging.getLogger(__name__)

LOCK = ".run.lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextmanager
def holding(folders: Sequence[Path]) -> Iterator[None]:
    """Holds the locks of these folders, which are made if they are not there, until the block ends or the process dies.

    Folders that were made and are still empty are removed again. On a file system without locks a warning is all.

    Raises:
        UserError: another process holds one.
        OSError: a folder cannot be written.
    """
    with ExitStack() as held:
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            held.enter_context(_holding(folder))
        yield


@contextmanager
def _holding(folder: Path) -> Iterator[None]:
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    try:
        file = _lock(path)
        try:
            yield
        finally:
            if file is not None:
                path.unlink(missing_ok=True)
                file.close()
    finally:
        for each in made:
            try:
                each.rmdir()
            except OSError:
                break


def _lock(path: Path) -> IO[str] | None:
    """The locked file; None where files cannot be locked."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                message = _refusal(path)
                file.close()
                raise UserError(message) from error
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            logger.warning(
                "%s: this file system has no locks (%s); make sure that no other run writes there", path.parent, error
            )
            return None
        if _is_still(path, file):
            break
        # Its holder removed it between our opening and our locking: another process may have made a new one.
        file.close()
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since})
    # A full disk: what an interrupted save left there is removed under this lock, which holds without a name as well.
    with suppress(OSError):
        file.truncate(0)
        os.write(file.fileno(), holder.encode())
    return file


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _refusal(path: Path) -> str:
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        # Between taking the lock and saying so.
        who = "another process"
    return (
        f"{path.parent} is in use by a run: {who}; wait for it, stop it, or choose another logging.run_dir and "
        "checkpoint.directory"
    )
