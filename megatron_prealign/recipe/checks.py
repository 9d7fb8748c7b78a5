"""Errors about values in a recipe: each names the field, the value and what was expected."""

import math
from dataclasses import fields, is_dataclass
from typing import Any

MOST = 2**63 - 1
"""Largest number in a recipe, the largest 64-bit integer."""
MOST_MINUTES = 10 * 365 * 24 * 60
"""Longest timeout, ten years in minutes; much longer ones overflow in timers."""

MOST_LAYERS = 10_000
"""Blocks of a model, whose weights in the loss are listed one by one."""


class RecipeValueError(ValueError):
    """A field of a recipe has an invalid value. `load_recipe` turns it into a `UserError` that names the file."""

    fields: tuple[str, ...] = ()
    """Paths of the fields that the message names, such as `model.hidden_size`."""


def require(condition: bool, field: str, got: object, expected: str, *others: str) -> None:
    """Raises a `RecipeValueError` with `field`, the value `got` and what was `expected`, unless `condition` is true.

    Args:
        field: Path of the field, such as `model.hidden_size`; of an entry of a mapping, with its key.
        others: Paths of the fields that `expected` names.
    """
    if not condition:
        error = RecipeValueError(f"{field} is {got}, expected {expected}")
        error.fields = (field, *others)
        raise error


def require_minutes(field: str, value: float | None) -> None:
    """Raises a `RecipeValueError` unless `value` is None or a positive number of minutes that timers can count."""
    require(
        value is None or 0 < value <= MOST_MINUTES,
        field,
        value,
        f"a positive number of minutes, at most {MOST_MINUTES:,}",
    )


def require_finite(section: Any, path: str = "") -> None:
    """Raises a `RecipeValueError` unless every number in the dataclass, its lists and mappings is finite and at most
    `MOST`."""
    for field in fields(section):
        _require_finite(getattr(section, field.name), f"{path}.{field.name}" if path else field.name)


def _require_finite(value: Any, path: str) -> None:
    if is_dataclass(value):
        require_finite(value, path)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            _require_finite(item, f"{path}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            _require_finite(item, f"{path}.{key}")
    elif isinstance(value, int | float):
        # Integers may be too large for `math.isfinite`.
        require(isinstance(value, int) or math.isfinite(value), path, value, "a finite number")
        require(abs(value) <= MOST, path, value, f"a number up to {MOST:,}")
