"""Resolves files, directories, glob patterns and Hugging Face datasets to one list of inputs in a fixed order."""

import bz2
import errno
import fnmatch
import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prealign.corpus.hub import HUB_PREFIX, parse_hub_name
from megatron_prealign.errors import UserError
from megatron_prealign.languages import check_language_code, is_language_code

Kind = Literal["jsonl", "txt", "parquet", "hub"]
Compression = Literal["", "gz", "zst", "bz2"]

_COMPRESSIONS: tuple[Compression, ...] = ("", "gz", "zst", "bz2")
_TEXT_KINDS: tuple[Kind, ...] = ("jsonl", "txt")
EXTENSIONS: dict[str, tuple[Kind, Compression]] = {
    **{f".{kind}" + (packed and f".{packed}"): (kind, packed) for kind in _TEXT_KINDS for packed in _COMPRESSIONS},
    ".parquet": ("parquet", ""),
}
"""File extension -> how to read the file. Case-insensitive."""
EXPECTED = ".jsonl, .txt (optionally with .gz, .zst or .bz2), .parquet"

_ANY_DIRECTORIES = "**"
_SHOWN_NAMES = 3
_BZ2_START = bz2.compress(b" ")[4:10]


@dataclass(frozen=True)
class Input:
    """A file or dataset to read documents from."""

    name: str
    """Path or Hub name, for messages and the sidecar."""
    kind: Kind
    compression: Compression
    """Compression of jsonl and txt; empty for parquet and hub."""
    bytes: int
    """Size on disk in bytes; 0 for hub."""


def resolve_inputs(texts: Sequence[str | Path]) -> list[Input]:
    """Resolves all inputs before any work starts.

    Each text is one of

    - a file with a supported extension (`EXTENSIONS`),
    - a directory: all such files in it, recursively, sorted by path,
    - a pattern with `*`, `?`, `[...]` or `**` (any directories): all matches, sorted by path; matching directories are
      searched recursively,
    - `hf:NAME[,CONFIG][:SPLIT]`: a Hugging Face Hub dataset or a local directory, read with `datasets`.

    The order follows `texts`. In directories and patterns, hidden files and files of other types are skipped, and a
    directory is read once even if several links point to it. A missing file is always an error: it is usually a typo
    that would silently shrink the corpus.

    Raises:
        UserError: no input; an input is missing, unreadable, unsupported or compressed differently from what its name
            says; a file is given twice, including through links; a directory or pattern yields no file.
    """
    return [one for inputs in resolve_each(texts) for one in inputs]


def resolve_each(texts: Sequence[str | Path]) -> list[list[Input]]:
    """Resolves each text separately; see `resolve_inputs`."""
    if not texts:
        raise UserError(f"no input given, expected files ({EXPECTED}), directories, patterns or hf:NAME")
    resolved: list[list[Input]] = []
    seen: dict[str, str] = {}
    for text in map(str, texts):
        resolved.append([])
        for name in [text] if text.startswith(HUB_PREFIX) else _paths(text):
            real = name if text.startswith(HUB_PREFIX) else os.path.realpath(name)
            if real in seen:
                raise UserError(
                    f"{name}: given twice (also as {seen[real]}); remove one, or its documents are counted twice"
                )
            seen[real] = name
            resolved[-1].append(_input(name))
    return resolved


def split_language(text: str) -> tuple[str, str | None]:
    """Splits `FILE:de` into an input for `resolve_inputs` and the language, None if there is none.

    A colon in the name of an existing file is part of the name. A language after `hf:NAME` requires a split before it.

    Raises:
        UserError: the part after the colon of an existing file or directory is not a language code.
    """
    head, colon, tail = text.rpartition(":")
    named = bool(colon) and not os.path.lexists(text)
    if named and not is_language_code(tail):
        if head and os.path.lexists(head):
            check_language_code(tail, f"--input {text}: the part after the colon")
        named = False
    if text.startswith(HUB_PREFIX):
        named = named and ":" in head[len(HUB_PREFIX) :]
    return (head, tail) if named else (text, None)


def _extension(name: str) -> str | None:
    """Returns the extension of a file name that is in `EXTENSIONS`, or None."""
    lower = name.lower()
    return next((extension for extension in EXTENSIONS if lower.endswith(extension)), None)


def _input(name: str) -> Input:
    if name.startswith(HUB_PREFIX):
        parse_hub_name(name)
        return Input(name, "hub", "", 0)
    extension = _extension(name)
    if extension is None:
        hint = "; rename it to .jsonl if it has one object per line" if ".json" in name else ""
        raise UserError(f"{name}: unsupported file type, expected one of {EXPECTED}{hint}")
    kind, compression = EXTENSIONS[extension]
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name}: not a regular file, expected one of {EXPECTED}")
        with open(name, "rb") as file:
            start = file.read(16)
            file.seek(-min(4, status.st_size), os.SEEK_END)
            end = file.read(4)
    except OSError as error:
        raise _unreadable(name, error) from error
    detected = _file_type(start, end)
    if detected is None and compression and status.st_size:
        raise UserError(
            f"{name}: content is not {compression} data, but its extension is {extension}; "
            "rename the file or download it again"
        )
    if detected is not None and detected != (compression or kind):
        raise UserError(f"{name}: content is {detected} data, but its extension is {extension}; rename the file")
    return Input(name, kind, compression, status.st_size)


def _unreadable(name: str, error: OSError) -> UserError:
    if error.errno == errno.ENOENT and os.path.islink(name):
        return UserError(f"{name}: broken link to {os.readlink(name)}; fix or remove the link")
    if error.errno == errno.ENOENT:
        return UserError(f"{name}: file not found; check the path")
    if error.errno == errno.ELOOP:
        return UserError(f"{name}: link points to itself; fix or remove the link")
    return UserError(f"{name}: cannot be read: {error.strerror}; check its permissions")


def _file_type(start: bytes, end: bytes) -> str | None:
    """File type detected from magic bytes; None for text or an unsupported type."""
    if start.startswith(b"\x1f\x8b"):
        return "gz"
    # A data frame, or a skippable frame, with which parallel and seekable files start.
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        return "zst"
    if start.startswith(b"BZh") and start[4:10] == _BZ2_START:
        return "bz2"
    return "parquet" if start[:4] == end == b"PAR1" else None


def _paths(text: str) -> list[str]:
    """Returns the files of a directory or pattern, sorted; any other path unchanged, even if it does not exist."""
    if os.path.isdir(text):
        what, candidates = "directory contains no file with", list(_expand(text, (_ANY_DIRECTORIES,), set()))
    elif glob.has_magic(text) and not os.path.lexists(text):
        what, candidates = "pattern matches no file with", list(_match(text))
    else:
        return [text]
    # Links count as files here, so that a broken link is an error.
    by_entry: dict[tuple[str, str], str] = {}
    for path in sorted(candidates, key=_depth_and_parts):
        if _extension(path) is not None:
            directory, name = os.path.split(path)
            # Directory links give one entry several paths; keep the shortest.
            by_entry.setdefault((os.path.realpath(directory), name), path)
    paths = sorted(by_entry.values(), key=lambda path: path.split(os.sep))
    if not paths:
        others = sorted({os.path.basename(path) for path in candidates})[:_SHOWN_NAMES]
        raise UserError(f"{text}: {what} {EXPECTED}; found {', '.join(others) or 'nothing'}; check the path")
    return paths


def _depth_and_parts(path: str) -> tuple[int, list[str]]:
    parts = path.split(os.sep)
    return len(parts), parts


def _match(pattern: str) -> Iterator[str]:
    """Yields the matches of a pattern; for a directory, the files in it, recursively."""
    base = os.sep if pattern.startswith(os.sep) else ""
    visited: set[tuple[int, int, int]] = set()
    for path in _expand(base, tuple(part for part in pattern.split(os.sep) if part), visited):
        if os.path.isdir(path):
            yield from _expand(path, (_ANY_DIRECTORIES,), visited)
        else:
            yield path


def _expand(base: str, parts: tuple[str, ...], visited: set[tuple[int, int, int]]) -> Iterator[str]:
    """Yields the paths in the directory `base` that match `parts`, the components of a pattern.

    `visited` keeps `**` from searching a directory twice, which also breaks cycles of links.
    """
    if not parts:
        yield base
        return
    if parts[0] == _ANY_DIRECTORIES:
        status = os.stat(base or os.curdir)
        key = status.st_dev, status.st_ino, len(parts)
        if key in visited:
            return
        visited.add(key)
        if len(parts) > 1:
            yield from _expand(base, parts[1:], visited)
    for name in _names(base, parts[0]):
        path = os.path.join(base, name)
        if parts[0] == _ANY_DIRECTORIES and os.path.isdir(path):
            yield from _expand(path, parts, visited)
        elif parts[0] == _ANY_DIRECTORIES and len(parts) == 1:
            yield path
        elif parts[0] != _ANY_DIRECTORIES and (len(parts) == 1 or os.path.isdir(path)):
            yield from _expand(path, parts[1:], visited)


def _names(directory: str, part: str) -> list[str]:
    """Names in a directory that match one component of a pattern; links last, so that a file is found by its own
    path."""
    if part != _ANY_DIRECTORIES and not glob.has_magic(part):
        return [part] if os.path.lexists(os.path.join(directory, part)) else []
    try:
        with os.scandir(directory or os.curdir) as entries:
            names = sorted((entry.is_symlink(), entry.name) for entry in entries)
    except OSError as error:
        raise _unreadable(directory, error) from error
    hidden = part.startswith(".")
    return [
        name
        for _, name in names
        if (hidden or not name.startswith(".")) and (part == _ANY_DIRECTORIES or fnmatch.fnmatchcase(name, part))
    ]
