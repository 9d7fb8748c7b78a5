"""`metrics.jsonl` of a run. Imports no torch."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
"""Name in the run directory."""


class MetricsFile:
    """Appends JSON lines to `RUN/metrics.jsonl`."""

    name = METRICS_FILE

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            with self._path.open("a+b") as file:
                line = json.dumps(record, ensure_ascii=False) + "\n"
                # A process that was killed, or a full disk, leaves an incomplete line.
                separator = "" if _ends_with_newline(file) else "\n"
                file.write((separator + line).encode())
        except OSError as error:
            # Other than a connection, a disk may have space again at the next line.
            logger.warning("cannot write %s (%s): lost the metrics of step %d", self._path, error, record["step"])

    def read(self, kind: str) -> Iterator[dict[str, Any]]:
        """Yields the records of a kind that the run has written so far; none from a missing file."""
        if not self._path.exists():
            return
        with self._path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    # Truncated when an earlier process was killed.
                    continue
                if isinstance(record, dict) and record.get("kind") == kind:
                    yield record

    def close(self) -> None: ...


def _ends_with_newline(file: BinaryIO) -> bool:
    """Whether a file, open to read and append, is empty or its last line is complete."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"
