"""What a command writes: checked before the work, and one line for the user where the disk refuses in the end."""

import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_prealign.errors import UserError

# What every version of the format has in the texts of its header.
_OURS = {"format_version", "languages", "tokenizer_fingerprint", "vocab_size"}
# safetensors itself takes no longer one.
_MAX_HEADER_BYTES = 100_000_000
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_table_output(path: str | Path) -> None:
    """Checks that a table can be written to `path` and that nothing but an older table is lost.

    Raises:
        UserError: it is a folder or a file of another kind, or its folder cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        kind = _kind_in_the_way(path)
        if kind:
            raise UserError(f"--output is {path}, {kind}, which is not overwritten; choose another path for the table")
    check_folder(path.parent, path, "--output")


def check_folder(folder: Path, path: str | Path, option: str) -> None:
    """Checks that `folder`, which need not be there yet, takes new files.

    Args:
        path: what the user named with `option`, for the message.

    Raises:
        UserError: it does not, or a file is in the way.
    """
    existing = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), Path())
    try:
        # Permissions alone tell too little: of a read-only disk, of root, of a folder of the kernel.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UserError(
            f"{option} is {path}, but {existing} does not take new files ({reason}); {_advice(error.errno)}"
        ) from error


@contextmanager
def writing(folder: Path, path: str | Path, what: str) -> Iterator[None]:
    """Makes `folder` and turns what the disk refuses within the block into one line; then no new folder stays.

    Args:
        path: what the user named, for the message.
        what: what is written there, for the message.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    from safetensors import SafetensorError

    new = [each for each in (folder, *folder.parents) if not os.path.lexists(each)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        _remove_empty(new)
        number = error.errno
        if number is None:
            raise
        raise _refused(path, what, number) from error
    except SafetensorError as error:
        _remove_empty(new)
        # It carries the number of the system's error in its text alone.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None:
            raise
        raise _refused(path, what, int(found[1])) from error


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _refused(path: str | Path, what: str, number: int) -> UserError:
    return UserError(f"{path}: cannot write the {what} ({os.strerror(number)}); {_advice(number)}")


def _advice(number: int | None) -> str:
    if number in _NO_ROOM:
        return "make room on its disk or choose another path"
    return "check its permissions or choose another path"


def _kind_in_the_way(path: Path) -> str:
    """What is at `path`, in words; empty for a table, also for a damaged one, and for a link to nothing."""
    if path.is_dir():
        return "a folder"
    if not path.exists():
        return ""
    if not path.is_file():
        return "no regular file"
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            size = int.from_bytes(start[:8], "little")
            header = b""
            if start[8:9] == b"{" and size <= _MAX_HEADER_BYTES:
                file.seek(8)
                header = file.read(size)
    except OSError as error:
        return f"a file that cannot be read ({error.strerror})"
    if not start:
        return "an empty file"
    if header:
        return "" if _is_ours(header) else "a safetensors file of something else"
    return "a file of another kind" if b"\0" in start else "a text file"


def _is_ours(header: bytes) -> bool:
    try:
        texts = json.loads(header)["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(texts, dict) and texts.keys() >= _OURS
