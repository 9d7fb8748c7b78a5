"""Descriptions of dataclass fields (type, default, docstring), from which help texts are built."""

import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any

# Strings with a metavar for help texts.
PATH_METAVARS = ("PATH", "PREFIX")
PathText = Annotated[str, PATH_METAVARS[0]]
PrefixText = Annotated[str, PATH_METAVARS[1]]
"""Path of a dataset without file extension."""
LANGUAGE_METAVAR = "CODE"
LanguageText = Annotated[str, LANGUAGE_METAVAR]
"""Language code; the command line checks it."""

_TYPES = {int: "INT", float: "NUMBER", bool: "BOOL", str: "TEXT"}


@dataclass(frozen=True)
class FieldDescription:
    """One field."""

    name: str
    type: Any
    """Type without `None` and `list`."""
    metavar: str
    """Placeholder for a value, such as INT, PATH or {stop,skip}."""
    is_list: bool
    required: bool
    default: Any
    """None if it is required."""
    help: str
    """Docstring of the field, on one line."""


def describe(kind: type) -> dict[str, FieldDescription]:
    """Returns name -> description of each field of the dataclass `kind`, in order.

    A field's annotation may carry a metavar: `Annotated[str, "PATH"]`.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    texts = docstrings(kind)
    described = {}
    for field in fields(kind):
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        required = default is MISSING
        plain, metavar, is_list = _plain(hints[field.name])
        described[field.name] = FieldDescription(
            name=field.name,
            type=plain,
            metavar=metavar,
            is_list=is_list,
            required=required,
            default=None if required else default,
            help=texts.get(field.name, ""),
        )
    return described


def docstrings(kind: type) -> dict[str, str]:
    """Returns name -> docstring of each field, on one line."""
    from docstring_parser import parse_from_object

    return {each.arg_name: one_line(each.description or "") for each in parse_from_object(kind).params}


def one_line(text: str) -> str:
    """Collapses every run of whitespace to one space."""
    return " ".join(text.split())


def section_of(kind: Any) -> type | None:
    """Returns the dataclass in an annotation such as `Section | None` or `list[Item]`; None if there is none."""
    while not is_dataclass(kind):
        inner = _inner(kind)
        if inner is None:
            return None
        kind = inner
    return typing.cast(type, kind)


def walk(kind: type, prefix: str = "") -> Iterator[tuple[str, FieldDescription]]:
    """Yields the dotted name (`training.seed`) and description of every field, including fields of sections."""
    hints = typing.get_type_hints(kind)
    for name, field in describe(kind).items():
        yield f"{prefix}{name}", field
        section = section_of(hints[name])
        if section is not None and not field.is_list:
            yield from walk(section, f"{prefix}{name}.")


def yaml_syntax(field: FieldDescription) -> str:
    """Value of a recipe's field as YAML and options take it: `INT`, `[TEXT, ...]` for lists, `{NAME: NUMBER}` for
    mappings, alternatives separated by a vertical bar."""
    if field.is_list:
        return f"[{field.metavar}, ...]"
    if field.metavar.startswith("{"):
        return field.metavar
    parts = []
    for part in field.metavar.split("|"):
        name, equals, value = part.partition("=")
        item = part.removesuffix("...")
        parts.append(f"{{{name}: {value}}}" if equals else f"[{item}, ...]" if item != part else part)
    return " | ".join(parts)


def is_union(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _inner(kind: Any) -> Any:
    """Returns the annotation inside `X | None`, `list[X]` or `Annotated[X, ...]`; None for other annotations."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, typing.Annotated):
        return arguments[0]
    if is_union(kind):
        return next((each for each in arguments if each is not types.NoneType), None)
    return None


def _plain(hint: Any) -> tuple[Any, str, bool]:
    """Returns the type without wrappers, the metavar, and whether the field is a list."""
    is_list, metavar = False, ""
    while True:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            hint, metavar = arguments[0], metavar or str(arguments[1])
        elif origin is list and not is_list:
            hint, is_list = arguments[0], True
        elif is_union(hint) and len(inner := [each for each in arguments if each is not types.NoneType]) == 1:
            (hint,) = inner
        else:
            return hint, metavar or _metavar(hint), is_list


def _metavar(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "{" + ",".join(map(str, arguments)) + "}"
    if is_union(hint):
        return "|".join(dict.fromkeys(_metavar(each) for each in arguments if each is not types.NoneType))
    if origin is dict:
        return f"NAME={_metavar(arguments[1])}"
    if origin is list:
        return f"{_metavar(arguments[0])}..."
    if is_dataclass(hint):
        return "SECTION"
    return _TYPES.get(hint, "VALUE")
