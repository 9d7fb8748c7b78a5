"""TensorBoard event file of a run: a single writer for all scalars, since TensorBoard reads one file at a time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes scalars to a directory; the file is created by the first `write`."""

    def __init__(self, directory: Path, *, enabled: bool) -> None:
        self._directory = directory
        self._enabled = enabled
        self._writer: Any = None

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Writes scalars (tag -> value) of an optimizer step of the run."""
        if not self._enabled:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory))
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
