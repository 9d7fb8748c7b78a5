"""Which files to read: files, directories, glob patterns and Hugging Face datasets become one list in a fixed order."""

import bz2
import errno
import fnmatch
import glob
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_prealign.corpus.hub import HUB_PREFIX, parse_hub_name
from megatron_prealign.errors import UserError

Kind = Literal["jsonl", "txt", "parquet", "hub"]
Compression = Literal["", "gz", "zst", "bz2"]

_COMPRESSIONS: tuple[Compression, ...] = ("", "gz", "zst", "bz2")
_TEXT_KINDS: tuple[Kind, ...] = ("jsonl", "txt")
ENDINGS: dict[str, tuple[Kind, Compression]] = {
    **{f".{kind}" + (packed and f".{packed}"): (kind, packed) for kind in _TEXT_KINDS for packed in _COMPRESSIONS},
    ".parquet": ("parquet", ""),
}
"""Ending of a file name -> how to read the file. Capital letters count as small ones."""
EXPECTED = ".jsonl, .txt (also with .gz, .zst or .bz2 behind it), .parquet"

_ANY_DIRECTORIES = "**"
_SHOWN_NAMES = 3
_BZ2_START = bz2.compress(b" ")[4:10]


@dataclass(frozen=True)
class Input:
    """One thing to read documents from."""

    name: str
    """The path as found, or the `hf:` text; for messages and the sidecar."""
    kind: Kind
    compression: Compression
    """Of jsonl and txt; parquet and hub have none around them."""
    bytes: int
    """Size on disk; 0 for hub."""


def resolve_inputs(texts: Sequence[str | Path]) -> list[Input]:
    """Finds everything to read, before any work starts.

    Each text is one of

    - a file of a known ending (`ENDINGS`),
    - a directory: all such files in it and below, sorted by path,
    - a pattern with `*`, `?`, `[...]` or `**` (any directories): what fits, sorted by path; directories that fit are
      searched,
    - `hf:NAME[,CONFIG][:SPLIT]`: a dataset of the Hugging Face hub or a local directory, read through `datasets`.

    The order is that of `texts`. In directories and patterns, hidden files and files of other kinds are left out, and a
    directory is read once, however many links lead to it. A missing file is most often a typing error that would
    quietly shrink the corpus, so it always stops.

    Raises:
        UserError: nothing given; something missing, unreadable, of an unknown ending or compressed otherwise than its
            name says; the same file twice, also through links; a directory or pattern without any file.
    """
    return [one for found in resolve_each(texts) for one in found]


def resolve_each(texts: Sequence[str | Path]) -> list[list[Input]]:
    """`resolve_inputs`, apart for each of `texts`."""
    if not texts:
        raise UserError(f"no input given; expected one or more files of {EXPECTED}, directories, patterns or hf:NAME")
    found: list[list[Input]] = []
    seen: dict[str, str] = {}
    for text in map(str, texts):
        found.append([])
        for name in [text] if text.startswith(HUB_PREFIX) else _paths(text):
            real = name if text.startswith(HUB_PREFIX) else os.path.realpath(name)
            if real in seen:
                raise UserError(
                    f"{name}: given twice (also as {seen[real]}); its documents would count double, leave one out"
                )
            seen[real] = name
            found[-1].append(_input(name))
    return found


def split_language(text: str) -> tuple[str, str | None]:
    """Takes `FILE:de` apart into what `resolve_inputs` knows and the language; None where none is named.

    A colon in the name of an existing file is left alone. `hf:NAME:SPLIT` needs its split before a language.
    """
    head, colon, tail = text.rpartition(":")
    named = bool(colon) and bool(re.fullmatch(r"[\w-]+", tail)) and not os.path.lexists(text)
    if text.startswith(HUB_PREFIX):
        named = named and ":" in head[len(HUB_PREFIX) :]
    return (head, tail) if named else (text, None)


def ending_of(name: str) -> str | None:
    """The one of `ENDINGS` that a file name has; None if it has none of them."""
    lower = name.lower()
    return next((ending for ending in ENDINGS if lower.endswith(ending)), None)


def _input(name: str) -> Input:
    if name.startswith(HUB_PREFIX):
        parse_hub_name(name)
        return Input(name, "hub", "", 0)
    ending = ending_of(name)
    if ending is None:
        hint = "; if it holds one object a line, name it .jsonl" if ".json" in name else ""
        raise UserError(f"{name}: unknown kind of file; expected one of {EXPECTED}{hint}")
    kind, compression = ENDINGS[ending]
    try:
        status = os.stat(name)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name}: is no ordinary file; expected one of {EXPECTED} on a disk")
        with open(name, "rb") as file:
            start = file.read(16)
            file.seek(-min(4, status.st_size), os.SEEK_END)
            end = file.read(4)
    except OSError as error:
        raise _unreadable(name, error) from error
    written = _magic(start, end)
    if written is None and compression and status.st_size:
        raise UserError(
            f"{name}: holds no {compression} data by its first bytes, its name says {ending}; rename the file after "
            "what it holds, or fetch it again"
        )
    if written is not None and written != (compression or kind):
        raise UserError(
            f"{name}: holds {written} data by its first bytes, its name says {ending}; "
            "rename the file after what it holds"
        )
    return Input(name, kind, compression, status.st_size)


def _unreadable(name: str, error: OSError) -> UserError:
    if error.errno == errno.ENOENT and os.path.islink(name):
        return UserError(f"{name}: a link to {os.readlink(name)}, which is missing; mend or remove the link")
    if error.errno == errno.ENOENT:
        return UserError(f"{name}: no such file; check the path")
    if error.errno == errno.ELOOP:
        return UserError(f"{name}: a link that leads back to itself; mend or remove the link")
    return UserError(f"{name}: may not be read ({error.strerror}); check its permissions")


def _magic(start: bytes, end: bytes) -> str | None:
    """What the first and last bytes of a file say it is; None for text and for what nobody here reads."""
    if start.startswith(b"\x1f\x8b"):
        return "gz"
    # A frame of data, or one of those that decoders pass over (parallel and seekable files begin with them).
    if start.startswith(b"\x28\xb5\x2f\xfd") or (start[1:4] == b"\x2a\x4d\x18" and start[0] >> 4 == 5):
        return "zst"
    if start.startswith(b"BZh") and start[4:10] == _BZ2_START:
        return "bz2"
    return "parquet" if start[:4] == end == b"PAR1" else None


def _paths(text: str) -> list[str]:
    """The files that a path or pattern stands for, sorted; a plain path stands for itself, whatever lies there."""
    if os.path.isdir(text):
        what, found = "a directory without any of", list(_expand(text, (_ANY_DIRECTORIES,), set()))
    elif glob.has_magic(text) and not os.path.lexists(text):
        what, found = "a pattern that fits none of", list(_match(text))
    else:
        return [text]
    # Links count as files here: one that leads nowhere must not go unnoticed.
    by_entry: dict[tuple[str, str], str] = {}
    for path in sorted(found, key=_depth_and_parts):
        if ending_of(path) is not None:
            directory, name = os.path.split(path)
            # Links between directories lead to the same entry of a directory on many ways; the shortest one names it.
            by_entry.setdefault((os.path.realpath(directory), name), path)
    paths = sorted(by_entry.values(), key=lambda path: path.split(os.sep))
    if not paths:
        others = sorted({os.path.basename(path) for path in found})[:_SHOWN_NAMES]
        raise UserError(f"{text}: {what} {EXPECTED}; found {', '.join(others) or 'nothing'}; check the path")
    return paths


def _depth_and_parts(path: str) -> tuple[int, list[str]]:
    parts = path.split(os.sep)
    return len(parts), parts


def _match(pattern: str) -> Iterator[str]:
    """What fits a pattern; of directories that fit, the files in them and below."""
    base = os.sep if pattern.startswith(os.sep) else ""
    visited: set[tuple[int, int, int]] = set()
    for path in _expand(base, tuple(part for part in pattern.split(os.sep) if part), visited):
        if os.path.isdir(path):
            yield from _expand(path, (_ANY_DIRECTORIES,), visited)
        else:
            yield path


def _expand(base: str, parts: tuple[str, ...], visited: set[tuple[int, int, int]]) -> Iterator[str]:
    """What lies under the directory `base` and fits `parts`, the parts of a pattern between slashes.

    `visited` keeps `**` from searching a directory twice, which also ends the circles that links can make.
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
    """The names in a directory that fit one part of a pattern; what is no link first, so that it is found by its own
    path."""
    if part != _ANY_DIRECTORIES and not glob.has_magic(part):
        return [part] if os.path.lexists(os.path.join(directory, part)) else []
    try:
        with os.scandir(directory or os.curdir) as entries:
            found = sorted((entry.is_symlink(), entry.name) for entry in entries)
    except OSError as error:
        raise _unreadable(directory, error) from error
    hidden = part.startswith(".")
    return [
        name
        for _, name in found
        if (hidden or not name.startswith(".")) and (part == _ANY_DIRECTORIES or fnmatch.fnmatchcase(name, part))
    ]
