"""`metrics.jsonl` of a run. Imports no torch."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends JSON lines to `RUN/metrics.jsonl`."""

    name = "metrics.jsonl"

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, record: Mapping[str, Any]) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
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
