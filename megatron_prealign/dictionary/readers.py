"""Reads word lists in all supported formats; errors name the file and the line.

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
from megatron_prealign.languages import is_language_code
from megatron_prealign.text import plural

__all__ = ["DictionaryInput", "FileInfo", "OnError", "ReadErrors", "parse_input", "read_entries"]

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
# File extensions that determine the format, after removal of a compression extension.
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
    """Parses `"en-de"` into `("en", "de")`.

    Raises:
        UserError: `text` is not two or more different codes joined by hyphens.
    """
    codes = tuple(text.split("-"))
    valid = LANGUAGES_PATTERN.fullmatch(text) and all(map(is_language_code, codes))
    if not valid or len(set(codes)) != len(codes):
        raise UserError(
            f"{where}: got languages {text!r}, expected two or more different codes joined by '-', source first, "
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
    """Parses `FILE[:en-de]`; a colon that is part of an existing file's name is preserved.

    Raises:
        UserError: neither `text` nor the default specifies languages.
    """
    path, suffix = _split_languages(text)
    if suffix is not None:
        languages = parse_languages(suffix, f"--input {text}")
    else:
        if default_languages is None:
            file = text.partition(":")[0]
            raise UserError(
                f"--input {text}: languages are missing, expected FILE:SOURCE-TARGET such as {file}:en-de; or use "
                "--languages en-de for all files"
            )
        languages = parse_languages(default_languages, "--languages")
    return DictionaryInput(path=Path(path), languages=languages, format=format, licence=licence, weights=weights)


def parse_bitext(text: str) -> DictionaryInput:
    """Parses `FILE:en-de`, a file of parallel text.

    Raises:
        UserError: `text` does not specify two languages.
    """
    path, suffix = _split_languages(text)
    languages = () if suffix is None else parse_languages(suffix, f"--bitext {text}")
    if len(languages) != 2:
        raise UserError(
            f"--bitext {text}: got {plural(len(languages), 'language')}, expected the two of the columns as "
            f"FILE:SOURCE-TARGET such as {path}:en-de"
        )
    return DictionaryInput(path=Path(path), languages=languages)


def _split_languages(text: str) -> tuple[str, str | None]:
    """Splits `FILE:en-de` at its last colon; None if there are no languages, or the colon belongs to a file's name."""
    path, colon, suffix = text.rpartition(":")
    if colon and LANGUAGES_PATTERN.fullmatch(suffix) and not Path(text).exists():
        return path, suffix
    return text, None


def detect_file(path: Path) -> str:
    """Detects the format of a file from its name and first lines; `auto` if `lines` has to detect it.

    Raises:
        UserError: the file cannot be opened, or its format is unknown.
    """
    if path.is_dir():
        if any((path / f"expr.csv{ending}").exists() for ending in ("", *_COMPRESSED)):
            return "panlex"
        raise UserError(f"{path}: got a directory without expr.csv, expected a word list or the CSV files of PanLex")
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
    """Returns `path` with its dictd extension replaced."""
    return path.with_name(path.name.removesuffix(".dz").removesuffix(".dict").removesuffix(".index") + ending)


def _detect_content(path: Path) -> str:
    start = read_start(path)
    if b"\0" in start and not start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(
            f"{path}: unknown format, expected a text file or one of the extensions {', '.join(sorted(_ENDINGS))}; set "
            "--format, or convert the file"
        )
    lines = (line.strip() for line in start.decode("utf-8-sig", "replace").split("\n"))
    first = next((line for line in lines if line), "")
    if first.startswith("#") and "CEDICT" in start.decode("utf-8", "replace").upper() or _CEDICT_LINE.fullmatch(first):
        return "cedict"
    if first.startswith("{"):
        # A line longer than the bytes read is truncated and does not parse as JSON.
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
    source: DictionaryInput, errors: ReadErrors, on_error: OnError = "stop", info: FileInfo | None = None
) -> Iterator[Entries]:
    """Yields the entries of a file in blocks.

    Args:
        source: the file and its languages.
        errors: collects every skipped line (only with `on_error="skip"`).
        on_error: `stop` raises at the first bad line, `skip` counts it and continues.
        info: filled with the file's metadata; complete after the last block.

    Raises:
        UserError: a file that cannot be opened or is empty, corrupt compressed data, files of one dictionary that do
            not match; with `stop` also a bad line (`file:line`, got, expected).
    """
    info = info if info is not None else FileInfo()
    info.format = detect_file(source.path) if source.format == "auto" else source.format
    yield from _module(info.format).read(Reading(source, errors, on_error, info))
    info.licence = info.licence or source.licence


def _module(format: str) -> ModuleType:
    return importlib.import_module(f"megatron_prealign.dictionary.formats.{_MODULES[format]}")
