"""Text for people: aligned columns, counts, sizes, durations, commands to copy, the last lines of a command."""

import re
import shlex
from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats rows as lines with aligned columns, the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def shorten(text: str, length: int) -> str:
    """`text` with its middle replaced by an ellipsis if it is longer than `length` characters."""
    if len(text) <= length:
        return text
    head = length // 2
    return f"{text[:head]}…{text[len(text) - (length - head - 1) :]}"


def align_left(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Formats labels and texts as lines, the texts below each other."""
    width = max(len(label) for label, _ in rows)
    return [f"{label.ljust(width)}  {text}" for label, text in rows]


def readable_bytes(count: int) -> str:
    """Human-readable size, such as 1.5 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} EB"


def duration(seconds: float | None) -> str:
    """Human-readable duration: 0.25 s, 40 s, 3.3 min, 1.2 h; `-` for None."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str) -> str:
    """Count with its noun: 1 process, 1,200 processes, 2 dictionaries."""
    if count == 1:
        return f"1 {noun}"
    if re.search(r"(s|x|ch|sh)$", noun):
        noun += "es"
    elif re.search(r"[^aeiou]y$", noun):
        noun = noun[:-1] + "ies"
    else:
        noun += "s"
    return f"{count:,} {noun}"


def clock(seconds: float) -> str:
    """Duration as hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def number_hint(text: str, kind: type) -> str:
    """Advice for a number that is written with a comma, `; write 2.0e-3` for `2,0e-3`; empty for any other text.

    Args:
        text: Value that is no number.
        kind: `int` or `float`.
    """
    # A comma before three digits separates thousands in some languages and the fraction in others.
    thousands = re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+", text)
    fraction = kind is float and re.fullmatch(r"[+-]?\d*,\d+([eE][+-]?\d+)?", text)
    readings = [text.replace(",", "")] if thousands else []
    readings += [text.replace(",", ".")] if fraction else []
    return f"; write {' or '.join(readings)}" if readings else ""


def command(*words: object, processes: int = 1) -> str:
    """Command line of this package to copy into a shell: `megatron-prealign` and `words`, quoted; with torchrun for
    several processes."""
    program = ["megatron-prealign"]
    if processes > 1:
        program = ["torchrun", "--standalone", "--nproc-per-node", str(processes), "-m", "megatron_prealign"]
    return shlex.join([*program, *map(str, words)])


def next_line(command_line: str) -> str:
    """Line that names the command that usually follows.

    Args:
        command_line: Result of `command`.
    """
    return f"next: {command_line}"


def closing(made: str, *commands: str) -> str:
    """The last lines of a command: what it made, with its numbers, and the commands that usually follow.

    Args:
        commands: Results of `command`.
    """
    return "\n".join([made, *map(next_line, commands)])
