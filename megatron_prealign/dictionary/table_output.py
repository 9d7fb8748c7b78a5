"""Where a table may be written: nothing but an older table is overwritten."""

import json
import os
from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import check_writable

# What every version of the format has in the texts of its header.
_OURS = {"format_version", "languages", "tokenizer_fingerprint", "vocab_size"}
# safetensors itself takes no longer one.
_MAX_HEADER_BYTES = 100_000_000


def check_table_output(path: str | Path) -> None:
    """Checks that a table can be written to `path` and that nothing but an older table is lost.

    Raises:
        UserError: it is a directory or a file of another kind, or its directory cannot be written.
    """
    path = Path(path)
    if os.path.lexists(path):
        kind = _kind_in_the_way(path)
        if kind:
            raise UserError(f"--output is {path}, {kind}, which is not overwritten; choose another path for the table")
    check_writable(path.parent, f"--output {path}")


def _kind_in_the_way(path: Path) -> str:
    """What is at `path`, in words; empty for a table, also for a damaged one, and for a link to nothing."""
    if path.is_dir():
        return "a directory"
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
