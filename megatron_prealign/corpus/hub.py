"""Reads datasets of the Hugging Face hub, and local directories in its forms, row by row through `datasets`."""

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
    """What `hf:NAME[,CONFIG][:SPLIT]` says."""

    dataset: str
    """`owner/name` on the hub, or a local directory."""
    config: str | None
    split: str


def parse_hub_name(text: str) -> HubName:
    """Takes `hf:NAME[,CONFIG][:SPLIT]` apart; the split is `train` where none is named.

    Raises:
        UserError: another form.
    """
    match = re.fullmatch(rf"{HUB_PREFIX}([^:,]+)(?:,([^:,]+))?(?::([^:,/]+))?", text)
    if match is None:
        raise UserError(f"{text}: not understood; expected {_FORM}")
    return HubName(match[1], match[2], match[3] or DEFAULT_SPLIT)


def read_hub_batches(
    name: str, columns: Sequence[str], first_row: int, batch_bytes: int
) -> Iterator[tuple[bytes, int]]:
    """Streams the rows of a dataset, as `parquet.read_batches` does those of a file.

    Nothing is stored on disk but what `datasets` itself keeps.

    Args:
        name: `hf:NAME[,CONFIG][:SPLIT]`.
        columns: the columns to read, nested ones with dots.
        first_row: rows to pass over; without an index they are read all the same.
        batch_bytes: about how many bytes of values make a batch.

    Yields:
        The payload (see `parquet.rows_of`) and the number of the next row.

    Raises:
        UserError: `datasets` is not installed, or there is no such dataset, config or split.
        ReadError: a column is missing, or reading broke off.
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
        # Behind `datasets` lie the network and many readers of files, each with errors of its own.
        raise ReadError(
            name, f"reading broke off ({_told(error)}); try again, or download the dataset first"
        ) from error


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
        where = "directory" if os.path.isdir(name.dataset) else "dataset"
        raise UserError(
            f"{text}: the {where} cannot be opened ({_told(error)}); check the name, its config and split ({_FORM}), "
            "and the network"
        ) from error


def _told(error: Exception) -> str:
    """An error of someone else's code in one line of moderate length."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
    return text if len(text) <= 300 else text[:297] + "..."
