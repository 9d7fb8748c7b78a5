"""The options of a command out of a dataclass: its fields are the options, its docstrings are the help."""

import argparse
import math
import typing
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from megatron_prealign.cli import help
from megatron_prealign.cli.suggest import suggestion
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import FieldDescription, describe

Options = TypeVar("Options")

_UNNAMED = "unnamed"
_KINDS = {int: "a whole number", float: "a number", str: "text"}


def parse_options(
    options: type[Options], command: str, argv: Sequence[str], *, positional: str | None = None
) -> Options:
    """Parses `argv` into the dataclass `options`, or prints the help and exits with status 0.

    Options are written with dashes (`--text-key`) or underscores; one that takes several values takes them one after
    another (`--input A B`); a field that is true or false is a bare option (`--resume`, `--no-python-loop`).

    Args:
        positional: The field that may be given without its name.

    Raises:
        UserError: an unknown option, a missing one or a value of the wrong type.
    """
    values, extras = read_options(options, command, argv, positional=positional)
    if extras:
        raise unknown_argument(command, extras[0], [option_name(name) for name in describe(options)])
    return build_options(options, command, values, positional=positional)


def read_options(
    options: type, command: str, argv: Sequence[str], *, positional: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Field -> value of what is given, and the arguments that the command does not know; or prints the help and exits
    with status 0.

    Raises:
        UserError: a value is missing or of the wrong type.
    """
    described = describe(options)
    if any(each in ("-h", "--help") for each in argv):
        print(_help(options, command, positional))
        raise SystemExit(0)
    parser = _Parser(command, described, positional)
    given, extras = parser.parse_known_args(with_underscores(argv))
    values = {name: value for name, value in vars(given).items() if value is not None}
    unnamed = values.pop(_UNNAMED, None)
    if positional is not None and unnamed:
        values.setdefault(positional, unnamed)
    for name in values:
        if _is_mapping(described[name]):
            values[name] = dict(values[name])
    return values, extras


def build_options(
    options: type[Options], command: str, values: dict[str, Any], *, positional: str | None = None
) -> Options:
    """The dataclass out of what `read_options` found.

    Raises:
        UserError: a required option is missing, or the values do not fit together.
    """
    described = describe(options)
    missing = [
        described[name].metavar if name == positional else option_name(name)
        for name, field in described.items()
        if field.required and name not in values
    ]
    if missing:
        names = missing[0] if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]}"
        raise UserError(f"{names} {'is' if len(missing) == 1 else 'are'} required; see {_see(command)}")
    return options(**values)


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Turns `--text-key x` into `--text_key x`, as the fields are called. Values stay as they are."""
    changed = []
    for argument in argv:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        changed.append(name + equals + value)
    return changed


def option_name(field: str) -> str:
    """`--text-key` of the field `text_key`."""
    return "--" + field.replace("_", "-")


def unknown_argument(command: str, argument: str, known: Sequence[str]) -> UserError:
    """The error about an argument that a command does not take."""
    if not argument.startswith("-"):
        return UserError(f"unexpected argument {argument!r}; see {_see(command)}")
    name = argument.partition("=")[0].replace("_", "-")
    near = suggestion(name, known)
    return UserError(f"unknown option {name}{near or f'; see {_see(command)}'}")


def _see(command: str) -> str:
    return f"megatron-prealign {command} --help"


class _Parser(argparse.ArgumentParser):
    """Raises what is wrong instead of ending the process, and takes only whole names."""

    def __init__(self, command: str, described: dict[str, FieldDescription], positional: str | None) -> None:
        super().__init__(prog=f"megatron-prealign {command}", add_help=False, allow_abbrev=False)
        self._command = command
        for name, field in described.items():
            reader, several = _reader(field), field.is_list or _is_mapping(field)
            if name == positional:
                self.add_argument(_UNNAMED, nargs="*" if several else "?", type=reader)
            if field.type is bool:
                self.add_argument(f"--{name}", action="store_true", default=None)
                if field.default:
                    self.add_argument(f"--no_{name}", dest=name, action="store_false", default=None)
            elif several:
                self.add_argument(f"--{name}", nargs="*", action="extend", type=reader)
            else:
                self.add_argument(f"--{name}", type=reader)

    def error(self, message: str) -> NoReturn:
        # "argument --output: expected one argument"
        name, _, problem = message.removeprefix("argument ").partition(": ")
        what = "needs a value" if problem.startswith("expected") else f": {problem}"
        raise UserError(f"{name.replace('_', '-')} {what}; see {_see(self._command)}")


def _reader(field: FieldDescription) -> Any:
    """What turns the text of a value into the field's type."""
    name, kind = option_name(field.name), field.type

    def read(text: str) -> Any:
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
            if text not in choices:
                near = suggestion(text, choices)
                raise UserError(f"{name} is {text}, expected one of {', '.join(choices)}{near}")
            return text
        if typing.get_origin(kind) is dict:
            key, equals, value = text.partition("=")
            if not key or not equals:
                raise UserError(f"{name} is {text}, expected {field.metavar}")
            return key, _convert(name, value, typing.get_args(kind)[1])
        return _convert(name, text, kind)

    return read


def _convert(name: str, text: str, kind: type) -> Any:
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"{name} is {text}, expected {_KINDS[kind]}") from None
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name} is {text}, expected a finite number")
    return value


def _help(options: type, command: str, positional: str | None) -> str:
    described = describe(options)
    needed = {name: field for name, field in described.items() if field.required}
    arguments = [_left(field, name == positional) for name, field in needed.items()]
    rest = [field for name, field in described.items() if name not in needed]
    parts = [
        help.usage(command, [*arguments, *(["[options]"] if rest else [])]),
        help.paragraph(options.__doc__ or ""),
        help.rows("required", ((_left(each, each.name == positional), each.help) for each in needed.values())),
        help.rows(
            "options",
            ((_left(each, False), each.help if each.type is bool else help.with_default(each)) for each in rest),
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def _is_mapping(field: FieldDescription) -> bool:
    return typing.get_origin(field.type) is dict


def _left(field: FieldDescription, positional: bool) -> str:
    value = field.metavar + ("..." if field.is_list or _is_mapping(field) else "")
    if positional:
        return value
    if field.type is bool:
        return option_name(f"no_{field.name}" if field.default else field.name)
    return f"{option_name(field.name)} {value}"
