"""Checks the output path of a table: only an existing table may be overwritten."""

import json
import os
from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import check_writable

# Metadata keys that every version of the table format has in its header.
_TABLE_KEYS = {"format_version", "languages", "tokenizer_fingerprint", "vocab_size"}
# The limit of safetensors itself.
_MAX_HEADER_BYTES = 100_000_000


def check_table_output(path: str | Path) -> None:
    """Checks that a table can be written to `path` without overwriting anything but an existing table.

    Raises:
        UserError: `path` is a directory or a file of another kind, or its directory is not writable.
    """
    path = Path(path)
    if os.path.lexists(path):
        kind = _other_kind(path)
        if kind:
            raise UserError(
                f"--output {path}: got {kind}, expected an existing table or a new path; choose another path"
            )
    check_writable(path.parent, f"--output {path}")


def _other_kind(path: Path) -> str:
    """Description of what exists at `path`; "" for a table, even a corrupt one, and for a dangling link."""
    if path.is_dir():
        return "a directory"
    if not path.exists():
        return ""
    if not path.is_file():
        return "a special file"
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            size = int.from_bytes(start[:8], "little")
            header = b""
            if start[8:9] == b"{" and size <= _MAX_HEADER_BYTES:
                file.seek(8)
                header = file.read(size)
    except OSError as error:
        return f"an unreadable file ({error.strerror})"
    if not start:
        return "an empty file"
    if header:
        return "" if _is_table(header) else "another safetensors file"
    return "a binary file" if b"\0" in start else "a text file"


def _is_table(header: bytes) -> bool:
    try:
        metadata = json.loads(header)["__metadata__"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
    return isinstance(metadata, dict) and metadata.keys() >= _TABLE_KEYS
