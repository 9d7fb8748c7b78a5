"""Loads recipes from YAML files and `--section.field value` overrides, with jsonargparse."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from megatron_prealign.errors import UserError
from megatron_prealign.files.yaml_text import YamlError, dump_yaml, read_utf8
from megatron_prealign.recipe.checks import RecipeValueError, require
from megatron_prealign.recipe.describe import section_of
from megatron_prealign.recipe.document import check_document, check_value, field_type
from megatron_prealign.recipe.explain import explain
from megatron_prealign.recipe.recipe import Recipe

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


@contextmanager
def as_user_error(where: str) -> Iterator[None]:
    """Turns errors of jsonargparse and of the recipe's checks into a one-line `UserError` that starts with `where`."""
    from jsonargparse import ArgumentError

    try:
        yield
    except (ArgumentError, RecipeValueError, YamlError) as error:
        raise UserError(f"{where}: {explain(error)}") from error
    except ValueError as error:
        # jsonargparse wraps the error of an optional section's check into its error about the union.
        if not isinstance(error.__cause__ or error.__context__, RecipeValueError):
            raise
        raise UserError(f"{where}: {explain(error)}") from error


def config_files(arguments: Sequence[str]) -> list[str]:
    """The --config files in `arguments`."""
    return [value for name, value in _options(arguments) if name == "config"]


def recipe_name(arguments: Sequence[str]) -> str:
    """Name of the recipe in messages: `recipe` and the --config files in `arguments`."""
    return " ".join(["recipe", *config_files(arguments)])


@cache
def recipe_parser(command: str) -> "ArgumentParser":
    """Returns a parser for the recipe's fields and `--config FILE` (repeatable, the last value of a field wins). The
    parser raises errors instead of exiting. Building it takes as long as parsing a recipe (0.1 s)."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"megatron-prealign {command}", exit_on_error=False)
    parser.add_argument("--config", action="config", help="recipe in YAML")
    parser.add_class_arguments(Recipe)
    return parser


def load_recipe(arguments: Sequence[str], command: str = "pretrain") -> Recipe:
    """Parses `["--config", "recipe.yaml", "--section.field", "value", ...]`.

    Raises:
        UserError: a file is missing, a key is unknown or defined twice, a type is wrong or values are inconsistent.
    """
    if not arguments:
        raise UserError(f"no recipe given; use --config FILE, see megatron-prealign {command} --help")
    _check_arguments(arguments)
    parser = recipe_parser(command)
    with as_user_error(recipe_name(arguments)):
        parsed = parser.parse_args(list(arguments))
        for name, hint in get_type_hints(Recipe).items():
            # jsonargparse passes the null of an empty `parallel:` on to the section's class.
            require(
                parsed[name] is not None or not is_dataclass(hint),
                name,
                "null",
                "fields; add some or remove the section",
            )
        values = parser.instantiate(parsed)
        return Recipe(**{field.name: values[field.name] for field in fields(Recipe)})


def _check_arguments(arguments: Sequence[str]) -> None:
    """Checks each file and each value of an option: jsonargparse takes the last of two equal keys, and reads values of
    any size and nesting."""
    for name, value in _options(arguments):
        kind = Recipe if name == "config" else field_type(name.removesuffix("+"))
        if kind is None:
            continue
        path = "" if name == "config" else name
        if section_of(kind) is not None and os.path.isfile(value):
            with as_user_error(f"recipe {value}"):
                check_document(read_utf8(Path(value)), kind, path)
        else:
            with as_user_error(recipe_name(arguments)):
                check_value(value, kind, path)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields name and value of `--name value` and `--name=value`."""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if not argument.startswith("--"):
            continue
        if equals:
            yield name[2:], value
        elif number + 1 < len(arguments) and not arguments[number + 1].startswith("--"):
            yield name[2:], arguments[number + 1]


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Converts the recipe to plain dictionaries and lists, for YAML or JSON."""
    return asdict(recipe)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the resolved recipe as YAML; `load_recipe(["--config", path])` returns an equal recipe."""
    path.write_text(dump_yaml(recipe_to_dict(recipe)), encoding="utf-8")
