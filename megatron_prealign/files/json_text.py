"""Reads JSON in which no name appears twice: Python's reader silently keeps the last value."""

import json
from typing import Any


def load_json(text: str | bytes) -> Any:
    """Parses a JSON text.

    Raises:
        ValueError: it is not valid JSON, is nested too deeply, or a name appears twice in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        duplicate = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{duplicate[:100]!r} is defined twice")
    return content
