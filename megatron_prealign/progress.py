"""Progress reporting: a tqdm bar on a terminal, a plain line every few seconds otherwise."""

import sys
import time
from types import TracebackType

_LOG_INTERVAL_S = 10.0
_TIMES = "{elapsed}<{remaining}, {rate_fmt}"


class Progress:
    """Shows progress towards a total, which may be unknown, on standard error.

    On a terminal it is a tqdm bar with ETA. Otherwise it writes at most one plain line every ten seconds, so
    that log files stay readable. `enabled=False` (ranks other than 0) shows nothing.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        *,
        unit: str = "items",
        unit_scale: bool = False,
        enabled: bool = True,
    ) -> None:
        """
        Args:
            description: What is done.
            total: Number of units; None if unknown.
            unit: Unit in the plural (documents), or B.
            unit_scale: Shorten numbers with the prefixes k, M, G: 1.15MB.
        """
        from tqdm import tqdm

        self._stream = sys.stderr
        self._terminal = self._stream.isatty()
        self._enabled = enabled
        self._last_line_s = time.monotonic()
        self._bar = tqdm(
            desc=description,
            total=total,
            unit=_tqdm_unit(unit),
            unit_scale=unit_scale,
            bar_format=None if total is None else f"{{l_bar}}{{bar}}| {_amounts(unit)} [{_TIMES}]",
            file=self._stream,
            dynamic_ncols=True,
            disable=not (enabled and self._terminal),
        )
        self._description, self._total, self._unit, self._unit_scale = description, total, unit, unit_scale
        self._count = 0
        self._start_s = time.monotonic()

    def update(self, amount: int = 1) -> None:
        """Adds `amount` finished units."""
        self._count += amount
        self._bar.update(amount)
        if self._enabled and not self._terminal and time.monotonic() - self._last_line_s >= _LOG_INTERVAL_S:
            self._write_line()

    def _write_line(self) -> None:
        from tqdm import tqdm

        self._last_line_s = time.monotonic()
        line = tqdm.format_meter(
            self._count,
            self._total or 0,
            self._last_line_s - self._start_s,
            prefix=self._description,
            unit=_tqdm_unit(self._unit),
            unit_scale=self._unit_scale,
            bar_format=None if self._total is None else f"{{desc}}: {_amounts(self._unit)} [{_TIMES}]",
        )
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._bar.close()
        if self._enabled and not self._terminal and self._count:
            self._write_line()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tqdm_unit(unit: str) -> str:
    """tqdm writes the unit directly after a number: right for 1.15MB, wrong for 381documents."""
    return unit if unit == "B" else f" {unit}"


def _amounts(unit: str) -> str:
    """tqdm's format of the finished and of all units: 1.15MB/2.30MB, 381/400 documents."""
    return "{n_fmt}{unit}/{total_fmt}{unit}" if unit == "B" else "{n_fmt}/{total_fmt}{unit}"
