"""Reads word lists: which words stand for each other in which languages, and where a file is broken.

Every format has a module in `formats`. Text files of any format may be compressed with gzip, zstd or bzip2.
"""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from megatron_prealign.dictionary.formats.base import (
    DictionaryInput,
    Entries,
    FileFormat,
    FileInfo,
    OnError,
    ReadErrors,
    Reading,
    read_start,
)
from megatron_prealign.errors import UserError

__all__ = [
    "DictionaryInput",
    "Entries",
    "FileInfo",
    "FileFormat",
    "OnError",
    "ReadErrors",
    "parse_input",
    "parse_languages",
    "read_entries",
]

LANGUAGES_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(-[A-Za-z][A-Za-z0-9_]*)+")

# Format -> module of `formats`.
_MODULES = {
    **dict.fromkeys(("auto", "pairs", "words", "tsv", "space"), "lines"),
    **dict.fromkeys(("wiktextract", "wiktextract-glosses"), "wiktextract"),
    "csv": "csv_table",
    "dictd": "dictd",
    "stardict": "stardict",
    "cedict": "cedict",
    "panlex": "panlex",
    "pyglossary": "other",
}
_COMPRESSED = (".gz", ".zst", ".bz2", ".dz")
# Endings that say enough, without one of a compression.
_ENDINGS = {
    ".index": "dictd",
    ".dict": "dictd",
    **dict.fromkeys((".ifo", ".idx", ".syn"), "stardict"),
    ".csv": "csv",
    **dict.fromkeys(
        (
            ".mdx",
            ".slob",
            ".bgl",
            ".xdxf",
            ".tei",
            ".dsl",
            ".mids",
            ".zim",
            ".quickdic",
            ".ldf",
            ".dictionary",
            ".edlin",
        ),
        "pyglossary",
    ),
}
_CEDICT_LINE = re.compile(r"\S+ \S+ \[.*\] /.*/")


def parse_languages(text: str, where: str) -> tuple[str, ...]:
    """`"en-de"` as `("en", "de")`.

    Raises:
        UserError: not two or more different codes joined by hyphens.
    """
    codes = tuple(text.split("-"))
    if not LANGUAGES_PATTERN.fullmatch(text) or len(set(codes)) != len(codes):
        raise UserError(
            f"{where}: languages {text!r}, expected two or more different codes joined by '-', source first, "
            "such as en-de (letters, digits and '_' in a code)"
        )
    return codes


def parse_input(
    text: str,
    default_languages: str | None = None,
    format: FileFormat = "auto",
    licence: str = "",
    weights: bool = False,
) -> DictionaryInput:
    """Splits `FILE[:en-de]`; a colon that belongs to the file's name is left alone.

    Raises:
        UserError: no languages given for this file, here or as the default.
    """
    path, colon, suffix = text.rpartition(":")
    if colon and LANGUAGES_PATTERN.fullmatch(suffix) and not Path(text).exists():
        languages = parse_languages(suffix, f"--input {text}")
    else:
        path = text
        if default_languages is None:
            file = text.partition(":")[0]
            raise UserError(
                f"--input {text}: no languages given, expected FILE:SOURCE-TARGET such as {file}:en-de, "
                "or --languages en-de for all files"
            )
        languages = parse_languages(default_languages, "--languages")
    return DictionaryInput(path=Path(path), languages=languages, format=format, licence=licence, weights=weights)


def detect_file(path: Path) -> str:
    """Format of a file by its name and its first lines; `auto` for one whose lines decide.

    Raises:
        UserError: the file cannot be opened, or is none that is known.
    """
    if path.is_dir():
        if any((path / f"expr.csv{ending}").exists() for ending in ("", *_COMPRESSED)):
            return "panlex"
        raise UserError(f"{path}: is a directory without expr.csv, expected a word list or the CSV files of PanLex")
    name = path.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    if name in ("expr.csv", "denotation.csv", "langvar.csv"):
        return "panlex"
    format = _ENDINGS.get(Path(name).suffix, "")
    if format == "dictd" and _with_ending(path, ".ifo").exists():
        return "stardict"
    return format or _detect_content(path)


def _with_ending(path: Path, ending: str) -> Path:
    """The file beside `path` that has its name with another ending."""
    return path.with_name(path.name.removesuffix(".dz").removesuffix(".dict").removesuffix(".index") + ending)


def _detect_content(path: Path) -> str:
    start = read_start(path)
    if b"\0" in start and not start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(
            f"{path}: not a text file and of no known ending ({', '.join(sorted(_ENDINGS))}); name its format with "
            "--format, or convert it"
        )
    lines = (line.strip() for line in start.decode("utf-8-sig", "replace").split("\n"))
    first = next((line for line in lines if line), "")
    if first.startswith("#") and "CEDICT" in start.decode("utf-8", "replace").upper() or _CEDICT_LINE.fullmatch(first):
        return "cedict"
    if first.startswith("{"):
        # A line longer than what was read ends too early for a JSON parser.
        if re.search(r'"lang_code"\s*:', first) and re.search(r'"(pos|senses|translations)"\s*:', first):
            return "wiktextract"
        try:
            record = json.loads(first)
        except ValueError:
            return "auto"
        if isinstance(record, dict) and "word" in record and "senses" in record:
            return "wiktextract"
    return "auto"


def read_entries(
    source: DictionaryInput, errors: ReadErrors, on_error: OnError = "stop", facts: FileInfo | None = None
) -> Iterator[Entries]:
    """Yields the words of every entry, many entries at a time.

    Args:
        source: the file and its languages.
        errors: gets every line left out (only with `on_error="skip"`).
        on_error: `stop` raises at the first bad line, `skip` counts it and goes on.
        facts: gets what else the file tells; complete when the last block has been read.

    Raises:
        UserError: a file that cannot be opened or holds nothing, damaged compressed data, files of one dictionary that
            do not fit together; with `stop` also a bad line (`file:line`, what it holds, what was expected).
    """
    facts = facts if facts is not None else FileInfo()
    facts.format = detect_file(source.path) if source.format == "auto" else source.format
    yield from _module(facts.format).read(Reading(source, errors, on_error, facts))
    facts.licence = facts.licence or source.licence


def _module(format: str) -> ModuleType:
    return importlib.import_module(f"megatron_prealign.dictionary.formats.{_MODULES[format]}")
