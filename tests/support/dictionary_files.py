"""Reads dictionary files for tests."""

import bz2
import gzip
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest

from megatron_prealign.dictionary.groups import GroupBuilder
from megatron_prealign.dictionary.readers import DictionaryInput, FileInfo, ReadErrors, read_entries


def read(path: Path, languages: str = "en-de", **options):
    """Returns all pairs, with the languages if a block has its own, the file info and the errors."""
    errors, info = ReadErrors(), FileInfo()
    on_error = options.pop("on_error", "stop")
    source = DictionaryInput(path=path, languages=tuple(languages.split("-")), **options)
    pairs = []
    for block in read_entries(source, errors, on_error, info):
        weights = block.weights or [1.0] * len(block.columns[0])
        pairs += [
            (*words, *((weight,) if block.weights else ()), *(block.languages or ())[1:])
            for *words, weight in zip(*block.columns, weights, strict=True)
        ]
    return pairs, info, errors


def add_entries(
    builder: GroupBuilder,
    entries: Iterable[Sequence[str]],
    languages: Sequence[str],
    weights: Sequence[float] | None = None,
) -> int:
    """Adds entries with words in `languages`, source first; returns their number of pairs."""
    columns = [list(column) for column in zip(*entries, strict=True)]
    return builder.add_columns(columns, languages, weights) if columns else 0


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("zstandard", reason="zstandard is not installed").compress(data)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": zstd,
}
