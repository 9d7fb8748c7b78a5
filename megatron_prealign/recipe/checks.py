"""How a recipe says that a value is wrong: always the field, the value got and what is expected."""


class RecipeValueError(ValueError):
    """A field of a recipe has a value that cannot work. `load_recipe` turns it into a `UserError` with the file's
    name."""


def require(condition: bool, field: str, got: object, expected: str) -> None:
    """Raises `RecipeValueError` naming `field`, the value `got` and what was `expected`, unless `condition` holds."""
    if not condition:
        raise RecipeValueError(f"{field} is {got}, expected {expected}")
