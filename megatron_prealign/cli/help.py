"""Formats help texts: usage, a summary, and a line or two per option."""

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING
from typing import Any

from megatron_prealign.recipe.describe import FieldDescription

_NAME_WIDTH = 28
_MAX_WIDTH = 110

Row = tuple[str, str]
"""Name (left column) and description (right column)."""


def paragraph(text: str) -> str:
    """Wraps text at the width of the terminal."""
    return "\n".join(textwrap.wrap(" ".join(text.split()), _width(), break_on_hyphens=False))


def usage(command: str, arguments: Sequence[str]) -> str:
    """Returns `usage: megatron-prealign COMMAND ARGUMENTS`, wrapped only between arguments."""
    start = f"usage: megatron-prealign {command}"
    lines, line = [], start
    for argument in arguments:
        if len(line) + 1 + len(argument) > _width():
            lines.append(line)
            line = " " * 7
        line += f" {argument}"
    return "\n".join([*lines, line])


def rows(title: str, entries: Iterable[Row]) -> str:
    """Formats a title and its entries; empty without entries."""
    lines = []
    for name, text in entries:
        wrapped = textwrap.wrap(text, _width() - _NAME_WIDTH, break_on_hyphens=False) or [""]
        fits = len(name) <= _NAME_WIDTH - 4
        first = f"  {name:<{_NAME_WIDTH - 4}}  {wrapped[0]}" if fits else f"  {name}"
        lines += [first.rstrip(), *(" " * _NAME_WIDTH + each for each in (wrapped[1:] if fits else wrapped))]
    return "\n".join([f"{title}:", *lines]) if lines else ""


def with_default(field: FieldDescription) -> str:
    """Help of a field, followed by its default unless that is empty, null or false."""
    default = field.default
    if field.required or default is None or default is MISSING or default in ("", [], {}) or default is False:
        return field.help
    return f"{field.help} (default: {_format_value(default)})"


def _format_value(value: Any) -> str:
    if value is True:
        return "true"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _MAX_WIDTH)
