"""Command-line options from a dataclass: its fields are the options, its docstrings are the help."""

import argparse
import math
import os
import typing
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from megatron_prealign.cli import help
from megatron_prealign.cli.suggest import suggestion
from megatron_prealign.errors import UserError
from megatron_prealign.languages import check_language_code
from megatron_prealign.recipe.checks import MOST, RecipeValueError
from megatron_prealign.recipe.describe import LANGUAGE_METAVAR, PATH_METAVARS, FieldDescription, describe
from megatron_prealign.text import number_hint

Options = TypeVar("Options")

_POSITIONAL = "positional"
_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string"}


def parse_options(
    options: type[Options], command: str, argv: Sequence[str], *, positional: str | None = None
) -> Options:
    """Parses `argv` into the dataclass `options`, or prints the help and exits with status 0.

    Options are written with dashes (`--text-key`) or underscores. List options take several values (`--input A B`).
    Boolean fields are flags (`--resume`, `--no-python-loop`).

    Args:
        positional: Field whose values may also be positional arguments.

    Raises:
        UserError: an option is unknown or missing, or a value has the wrong type.
    """
    values, extras = read_options(options, command, argv, positional=positional)
    if extras:
        raise unknown_argument(command, extras[0], [option_name(name) for name in describe(options)])
    return build_options(options, command, values, positional=positional)


def read_options(
    options: type, command: str, argv: Sequence[str], *, positional: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Returns field -> value of the options in `argv`, and the unknown arguments; or prints the help and exits with
    status 0.

    Raises:
        UserError: a value is missing or has the wrong type.
    """
    described = describe(options)
    if any(each in ("-h", "--help") for each in argv):
        print(_help(options, command, positional))
        raise SystemExit(0)
    parser = _Parser(command, described, positional)
    parsed, extras = parser.parse_known_args(with_underscores(argv))
    values = {name: value for name, value in vars(parsed).items() if value is not None}
    positional_values = values.pop(_POSITIONAL, None)
    if positional is not None and positional_values:
        values.setdefault(positional, positional_values)
    for name in values:
        if _is_mapping(described[name]):
            values[name] = dict(values[name])
    return values, extras


def build_options(
    options: type[Options], command: str, values: dict[str, Any], *, positional: str | None = None
) -> Options:
    """Builds the dataclass from the values of `read_options`.

    Raises:
        UserError: a required option is missing, or the values are inconsistent.
    """
    described = describe(options)
    missing = [
        described[name].metavar if name == positional else option_name(name)
        for name, field in described.items()
        if field.required and name not in values
    ]
    if missing:
        names = missing[0] if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]}"
        raise UserError(f"{names} {'is' if len(missing) == 1 else 'are'} required; see {_help_command(command)}")
    return options(**values)


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Turns option names into field names: `--text-key x` into `--text_key x`. Values are unchanged."""
    converted = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        converted.append(name + equals + value)
    return converted


def with_dashes(argv: Sequence[str]) -> list[str]:
    """Inverse of `with_underscores`, for commands that are shown."""
    converted = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        converted.append((name.replace("_", "-") if name.startswith("--") else name) + equals + value)
    return converted


def option_name(field: str) -> str:
    """Option of a field: `--text-key` for `text_key`."""
    return "--" + field.replace("_", "-")


@contextmanager
def errors_of_options(fields: Collection[str]) -> Iterator[None]:
    """Turns an error about fields of a recipe into one about the options that set them.

    Args:
        fields: Fields that options set, such as `code_switch.ratio` for `--ratio`. Other fields keep their names.

    Raises:
        UserError: the block raised a `RecipeValueError`.
    """
    try:
        yield
    except RecipeValueError as error:
        message = str(error)
        # The longest first: a name may be the beginning of another.
        for path in sorted(error.fields, key=len, reverse=True):
            section, name, *key = path.split(".")
            if f"{section}.{name}" in fields:
                # `code_switch.language_weights.de` is an entry of a mapping, written `--language-weights de=2`.
                message = message.replace(path, " ".join([option_name(name), *key]))
        raise UserError(message) from error


def unknown_argument(command: str, argument: str, known: Sequence[str]) -> UserError:
    """Returns the error for an argument that a command does not take."""
    if not argument.startswith("-"):
        return UserError(f"unexpected argument {argument!r}; see {_help_command(command)}")
    name = argument.partition("=")[0].replace("_", "-")
    hint = suggestion(name, known) or f"; see {_help_command(command)}"
    return UserError(f"unknown option {name}{hint}")


def _help_command(command: str) -> str:
    return f"megatron-prealign {command} --help"


class _Parser(argparse.ArgumentParser):
    """Raises errors instead of exiting, and does not accept abbreviated options."""

    def __init__(self, command: str, described: dict[str, FieldDescription], positional: str | None) -> None:
        super().__init__(prog=f"megatron-prealign {command}", add_help=False, allow_abbrev=False)
        self._command = command
        for name, field in described.items():
            convert, is_repeated = _converter(field), field.is_list or _is_mapping(field)
            if name == positional:
                self.add_argument(_POSITIONAL, nargs="*" if is_repeated else "?", type=convert)
            if field.type is bool:
                self.add_argument(f"--{name}", action="store_true", default=None)
                if field.default:
                    self.add_argument(f"--no_{name}", dest=name, action="store_false", default=None)
            elif is_repeated:
                self.add_argument(f"--{name}", nargs="*", action="extend", type=convert)
            else:
                self.add_argument(f"--{name}", type=convert)

    def error(self, message: str) -> NoReturn:
        # "argument --output: expected one argument"
        name, _, problem = message.removeprefix("argument ").partition(": ")
        text = f": {problem}"
        if problem.startswith("expected"):
            text = " needs a value"
        elif problem.startswith("ignored explicit argument"):
            text = " takes no value"
        raise UserError(f"{name.replace('_', '-')}{text}; see {_help_command(self._command)}")


def _converter(field: FieldDescription) -> Any:
    """Returns a function that converts the text of a value to the field's type."""
    name, kind = option_name(field.name), field.type

    def convert(text: str) -> Any:
        if field.metavar == LANGUAGE_METAVAR:
            return check_language_code(text, name)
        if field.metavar in PATH_METAVARS and text.startswith("~") and not os.path.lexists(text):
            raise UserError(f"{name} is {text}: the shell expands ~ only at the start of an unquoted argument")
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
            if text not in choices:
                raise UserError(f"{name} is {text}, expected one of {', '.join(choices)}{suggestion(text, choices)}")
            return text
        if typing.get_origin(kind) is dict:
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise UserError(f"{name} is {text}, expected {field.metavar}")
            return key, _convert(name, value, typing.get_args(kind)[1])
        return _convert(name, text, kind)

    return convert


def _convert(name: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{name} is {text}, expected {_TYPE_NAMES[kind]}{number_hint(text, kind)}") from None
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} is {text}, expected a finite number")
    if kind in (int, float) and abs(value) > MOST:
        raise UserError(f"{name} is {text[:40]}, expected a number up to {MOST:,}")
    return value


def _help(options: type, command: str, positional: str | None) -> str:
    described = describe(options)
    required = {name: field for name, field in described.items() if field.required}
    arguments = [_syntax(field, name == positional) for name, field in required.items()]
    optional = [field for name, field in described.items() if name not in required]
    parts = [
        help.usage(command, [*arguments, *(["[options]"] if optional else [])]),
        help.paragraph(options.__doc__ or ""),
        help.rows("required", ((_syntax(each, each.name == positional), each.help) for each in required.values())),
        help.rows(
            "options",
            ((_syntax(each, False), help.with_default(each)) for each in optional),
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _is_mapping(field: FieldDescription) -> bool:
    return typing.get_origin(field.type) is dict


def _syntax(field: FieldDescription, positional: bool) -> str:
    value = field.metavar + ("..." if field.is_list or _is_mapping(field) else "")
    if positional:
        return value
    if field.type is bool:
        name = option_name(field.name)
        return f"{name}, {option_name(f'no_{field.name}')}" if field.default else name
    return f"{option_name(field.name)} {value}"
