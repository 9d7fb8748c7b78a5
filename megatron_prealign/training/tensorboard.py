"""TensorBoard event file of a run: a single writer for all scalars, since TensorBoard reads one file at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prealign.training.metrics_log import scalars


class TensorBoard:
    """Writes the scalars of records to a directory; the file is created by the first `write`."""

    name = "TensorBoard"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writer: Any = None

    def write(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory))
        for tag, value in scalars(record).items():
            self._writer.add_scalar(tag, value, record["step"])

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
