"""Errors about values in a recipe: each names the field, the value and what was expected."""


class RecipeValueError(ValueError):
    """A field of a recipe has an invalid value. `load_recipe` turns it into a `UserError` that names the file."""


def require(condition: bool, field: str, got: object, expected: str) -> None:
    """Raises a `RecipeValueError` with `field`, the value `got` and what was `expected`, unless `condition` is true."""
    if not condition:
        raise RecipeValueError(f"{field} is {got}, expected {expected}")
