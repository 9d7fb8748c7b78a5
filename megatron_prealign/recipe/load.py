"""Recipes from YAML files and `--section.field value` overrides, by jsonargparse."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prealign.errors import UserError
from megatron_prealign.recipe.checks import RecipeValueError
from megatron_prealign.recipe.recipe import Recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turns jsonargparse's and the recipe's own complaints into one `UserError` line that starts with `where`."""
    from jsonargparse import ArgumentError

    try:
        yield
    except (ArgumentError, RecipeValueError) as error:
        cause: BaseException | None = error
        # A section's own check surfaces wrapped by jsonargparse: its text alone is the clear line.
        while cause is not None and not isinstance(cause, RecipeValueError):
            cause = cause.__cause__ or cause.__context__
        message = re.sub(r"\s*\n\s*", " ", str(cause or error)).strip()
        raise UserError(f"{where}: {message}") from error


def recipe_parser(command: str) -> "ArgumentParser":
    """A jsonargparse parser for the recipe's sections plus `--config FILE` (may be given several times, later wins)."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"megatron-prealign {command}",
        exit_on_error=False,
        description="Options are the fields of the recipe; a later --config or option overrides an earlier one.",
    )
    parser.add_argument("--config", action="config", help="recipe in YAML")
    parser.add_class_arguments(Recipe)
    return parser


def recipe_from_namespace(values: Any) -> Recipe:
    """The `Recipe` out of what `recipe_parser` parsed (and `instantiate` built)."""
    return Recipe(**{field.name: values[field.name] for field in fields(Recipe)})


def load_recipe(arguments: Sequence[str], command: str = "pretrain") -> Recipe:
    """Parses `["--config", "recipe.yaml", "--section.field", "value", ...]`.

    Raises:
        UserError: a missing file, an unknown key, a wrong type or values that do not fit together.
    """
    parser = recipe_parser(command)
    with as_user_error("recipe"):
        return recipe_from_namespace(parser.instantiate(parser.parse_args(list(arguments))))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain dictionaries and lists, ready for YAML or JSON."""
    return asdict(recipe)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe as YAML; `load_recipe(["--config", path])` gives an equal recipe back."""
    import yaml

    path.write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
