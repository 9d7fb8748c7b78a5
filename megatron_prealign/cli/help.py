"""Help texts: a short usage, a sentence, and a line or two for each option."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from typing import Any

from megatron_prealign.recipe.describe import FieldDescription

_LEFT = 28
_MOST_COLUMNS = 110

Row = tuple[str, str]
"""What stands on the left, and the text beside it."""


def paragraph(text: str) -> str:
    """Text in lines as wide as the terminal."""
    return "\n".join(textwrap.wrap(" ".join(text.split()), _columns(), break_on_hyphens=False))


def usage(command: str, arguments: Sequence[str]) -> str:
    """`usage: megatron-prealign COMMAND ARGUMENTS`, the arguments never cut in two."""
    start = f"usage: megatron-prealign {command}"
    lines, line = [], start
    for argument in arguments:
        if len(line) + 1 + len(argument) > _columns():
            lines.append(line)
            line = " " * 7
        line += f" {argument}"
    return "\n".join([*lines, line])


def rows(title: str, entries: Iterable[Row]) -> str:
    """A title and its entries; empty without entries."""
    lines = []
    for left, text in entries:
        wrapped = textwrap.wrap(text, _columns() - _LEFT, break_on_hyphens=False) or [""]
        first = f"  {left:<{_LEFT - 4}}  {wrapped[0]}" if len(left) <= _LEFT - 4 else f"  {left}"
        rest = wrapped[1:] if len(left) <= _LEFT - 4 else wrapped
        lines += [first.rstrip(), *(" " * _LEFT + each for each in rest)]
    return "\n".join([f"{title}:", *lines]) if lines else ""


def with_default(field: FieldDescription) -> str:
    """The help of a field with its default, where there is one to tell."""
    default = field.default
    if field.required or default is None or default is MISSING or default in ("", [], {}) or default is False:
        return field.help
    return f"{field.help} (default: {_shown(default)})"


def _shown(value: Any) -> str:
    if value is True:
        return "true"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _columns() -> int:
    return min(shutil.get_terminal_size().columns, _MOST_COLUMNS)
