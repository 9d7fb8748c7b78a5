"""Streams rows of Hugging Face Hub datasets, and of local directories in its formats, with `datasets`."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prealign.corpus.parquet import pack_batches, select_columns
from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.errors import UserError

HUB_PREFIX = "hf:"
DEFAULT_SPLIT = "train"
_ROWS_AT_ONCE = 64
_FORM = "hf:NAME[,CONFIG][:SPLIT], for example hf:allenai/c4,de:train"


@dataclass(frozen=True)
class HubName:
    """Parsed `hf:NAME[,CONFIG][:SPLIT]`."""

    dataset: str
    """`owner/name` on the hub, or a local directory."""
    config: str | None
    split: str


def parse_hub_name(text: str) -> HubName:
    """Parses `hf:NAME[,CONFIG][:SPLIT]`; the default split is `train`.

    Raises:
        UserError: the text does not have this form.
    """
    match = re.fullmatch(rf"{HUB_PREFIX}([^:,]+)(?:,([^:,]+))?(?::([^:,/]+))?", text)
    if match is None:
        raise UserError(f"{text}: invalid dataset name, expected {_FORM}")
    return HubName(match[1], match[2], match[3] or DEFAULT_SPLIT)


def read_hub_batches(
    name: str, columns: Sequence[str], first_row: int, batch_bytes: int
) -> Iterator[tuple[bytes, int]]:
    """Streams the rows of a dataset in batches, like `parquet.read_batches`.

    Stores nothing on disk except the cache of `datasets`.

    Args:
        name: `hf:NAME[,CONFIG][:SPLIT]`.
        columns: columns to read, nested ones with dots.
        first_row: number of rows to skip; formats without an index read them anyway.
        batch_bytes: approximate size of a batch in bytes of values.

    Yields:
        The payload (see `parquet.rows_of`) and the number of the next row.

    Raises:
        UserError: `datasets` is not installed, or the dataset, config or split does not exist.
        ReadError: a column is missing, or reading failed midway.
    """
    rows = _open(name)
    try:
        if first_row:
            rows = rows.skip(first_row)
        tables = rows.with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
        parts = (batch for table in tables for batch in select_columns(table, columns, name).to_batches())
        yield from pack_batches(parts, first_row, batch_bytes)
    except (ReadError, MemoryError):
        raise
    except Exception as error:
        # `datasets` raises many exception types, from the network and from its file readers.
        raise ReadError(name, f"reading failed: {_one_line(error)}; retry, or download the dataset first") from error


def _open(text: str) -> Any:
    name = parse_hub_name(text)
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{text}: the package {error.name or 'datasets'} is not installed; install it with "
            "pip install 'megatron-prealign[hub]'"
        ) from error
    datasets.disable_progress_bars()
    try:
        if any((Path(name.dataset) / part).exists() for part in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(name.dataset)
            return saved[name.split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(name.dataset, name.config, split=name.split, streaming=True)
    except Exception as error:
        kind = "directory" if os.path.isdir(name.dataset) else "dataset"
        raise UserError(
            f"{text}: cannot open {kind}: {_one_line(error)}; check name, config and split ({_FORM}) and the network"
        ) from error


def _one_line(error: Exception) -> str:
    """Returns an error as one line of at most 300 characters."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= 300 else text[:297] + "..."
