"""Checks the YAML of a recipe against its fields before jsonargparse reads it: unknown and repeated names, types and
numbers, each with its line and the index in a list."""

import difflib
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields
from typing import Any

from megatron_prealign.files.yaml_text import Node, YamlError, compose_yaml, construct, entries, line_of
from megatron_prealign.recipe.checks import MOST, RecipeValueError
from megatron_prealign.recipe.describe import is_union, section_of
from megatron_prealign.recipe.recipe import Recipe
from megatron_prealign.text import number_hint

SECTION = "a section (a mapping of fields)"
_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float"))
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list"}
_NAMES |= {dict: "a mapping"}


def check_document(text: str, kind: Any, path: str = "") -> None:
    """Checks the text of a file against the annotation `kind` of what it sets.

    Missing fields are not an error, except in items of lists: other files and options may set them.

    Args:
        path: Dotted name of the field; empty for a whole recipe.

    Raises:
        YamlError: the text is not valid YAML or defines a key twice.
        RecipeValueError: a field is unknown or set twice, or a value has another type or is not finite.
    """
    node = compose_yaml(text)
    if node is not None:
        _Document(lines=True).check(node, kind, path)


def check_value(text: str, kind: Any, path: str) -> None:
    """Checks the value of the option that sets the field at `path`, like `check_document` without lines.

    Raises:
        RecipeValueError: a field is unknown or set twice, or a value has another type or is not finite.
    """
    structured = text.lstrip().startswith(("{", "["))
    if not structured and not _takes_numbers(kind):
        return
    try:
        node = compose_yaml(text)
    except YamlError as error:
        if structured:
            raise RecipeValueError(f"{path}: {str(error).removeprefix('line 1: ')}") from error
        return
    if node is None:
        return
    if path.endswith("+") and node.id != "sequence":
        # `--data.sources+` appends one item.
        kind = typing.get_args(kind)[0]
    _Document(lines=False).check(node, kind, path.removesuffix("+"))


def field_type(path: str) -> Any:
    """Annotation of the recipe's field, or entry of a mapping, at a dotted path; None if there is none."""
    kind: Any = Recipe
    for name in path.split("."):
        section = section_of(kind)
        if section is not None and not _is_list(kind):
            kind = typing.get_type_hints(section).get(name)
        else:
            mapping = next((each for each in _choices(kind) if typing.get_origin(each) is dict), None)
            kind = None if mapping is None else typing.get_args(mapping)[1]
        if kind is None:
            return None
    return kind


def field_default(path: str) -> Any:
    """Default of the recipe's field at a dotted path such as `data.sources[0].weight`; `MISSING` if it is required, or
    is none."""
    parent, _, name = re.sub(r"\[\d+\]", "", path).rpartition(".")
    section = section_of(field_type(parent)) if parent else Recipe
    for each in fields(section) if section is not None else ():
        if each.name == name:
            return each.default if each.default_factory is MISSING else each.default_factory()
    return MISSING


def unknown_field(field: str, section: type) -> str:
    """Message about the unknown last name in `field`, with the closest name in the section or all of them."""
    names = [each.name for each in fields(section)]
    close = difflib.get_close_matches(field.rpartition(".")[2].replace("-", "_"), names, n=1)
    hint = f"; did you mean {close[0]}?" if close else f", expected one of {', '.join(names)}"
    return f"unknown field {field}{hint}"


def expected_types(kind: Any) -> str:
    """Describes the values that an annotation accepts, such as `a string, a list or a mapping`."""
    names = list(dict.fromkeys(_names(kind)))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


class _Document:
    def __init__(self, lines: bool) -> None:
        self._lines = lines
        self._set: dict[str, int] = {}

    def check(self, node: Node, kind: Any, path: str) -> None:
        """Checks a value of the field at `path`, whose annotation is `kind`."""
        section = section_of(kind)
        if node.id == "scalar" and node.tag == _NULL:
            return
        if section is None:
            self._check_plain(node, kind, path)
        elif _is_list(kind):
            if node.id != "sequence":
                self._fail(node, path, "a list")
            for number, item in enumerate(node.value):
                self._check_section(item, section, f"{path}[{number}]")
                self._check_required(item, section, f"{path}[{number}]")
        else:
            self._check_section(node, section, path)

    def _check_section(self, node: Node, section: type, path: str) -> None:
        if node.id != "mapping":
            expected = SECTION if path else "sections such as `model:` and `data:`"
            self._fail(node, path, expected)
        for key, value in entries(node):
            name = f"{path}.{key.value}" if path else str(key.value)
            kind, owner, known = section, path, True
            *parents, last = str(key.value).split(".")
            # `optimizer.lr: 1` is the same as `optimizer: {lr: 1}`.
            for parent in parents:
                inner = section_of(typing.get_type_hints(kind).get(parent))
                if inner is None:
                    last, known = parent, False
                    break
                kind, owner = inner, f"{owner}.{parent}" if owner else parent
            hints = typing.get_type_hints(kind)
            if not known or last not in hints:
                self._raise(key, unknown_field(f"{owner}.{last}" if owner else last, kind))
            if section_of(hints[last]) is None or _is_list(hints[last]):
                self._set_once(key, name)
            self.check(value, hints[last], name)

    def _set_once(self, key: Node, name: str) -> None:
        if name in self._set:
            self._raise(key, f"{name} is already defined (line {self._set[name]})")
        self._set[name] = line_of(key)

    def _check_required(self, node: Node, section: type, path: str) -> None:
        given = {key.value for key, value in entries(node) if value.tag != _NULL}
        required = [each.name for each in fields(section) if each.default is each.default_factory is MISSING]
        missing = [f"{path}.{name}" for name in required if name not in given]
        if missing:
            self._raise(node, f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required but not set")

    def _check_plain(self, node: Node, kind: Any, path: str) -> None:
        if node.id == "sequence":
            for number, item in enumerate(node.value):
                self._check_scalar(item, f"{path}[{number}]")
        elif node.id == "mapping":
            for key, item in entries(node):
                self._check_scalar(key, path)
                self._check_key(key, kind, path)
                self._check_scalar(item, f"{path}.{key.value}")
                if typing.get_origin(kind) is dict and item.tag != _NULL:
                    self._check_plain(item, typing.get_args(kind)[1], f"{path}.{key.value}")
        else:
            self._check_scalar(node, path)
        if not _accepts(kind, construct(node)):
            self._fail(node, path, f"{expected_types(kind)}{_hint(node, kind)}")

    def _check_key(self, key: Node, kind: Any, path: str) -> None:
        """Checks a key of a mapping; null is none."""
        keys = [typing.get_args(each)[0] for each in _choices(kind) if typing.get_origin(each) is dict]
        value = construct(key)
        if keys and (value is None or not any(_accepts(each, value) for each in keys)):
            expected = " or ".join(map(expected_types, keys))
            self._raise(key, f"{path} has the key {_shown(key)}, expected {expected}{_hint(key, keys[0])}")

    def _check_scalar(self, node: Node, path: str) -> None:
        if node.id == "scalar" and "\0" in node.value:
            self._raise(node, f"{path} is {node.value[:60]!r}, expected text without NUL characters")
        if node.tag not in (_INT, _FLOAT):
            return
        text, value = node.value, construct(node)
        if not math.isfinite(value if node.tag == _FLOAT else 0):
            self._fail(node, path, "a finite number")
        if abs(value) > MOST:
            self._raise(node, f"{path} is {_short(text)}, expected a number up to {MOST:,}")
        digits = text.lstrip("+-")
        if ":" in text or (node.tag == _INT and digits[:1] == "0" and digits.isdigit() and len(digits) > 1):
            self._fail(node, path, "a decimal number")

    def _fail(self, node: Node, path: str, expected: str) -> typing.NoReturn:
        self._raise(node, f"{f'{path} is' if path else 'got'} {_shown(node)}, expected {expected}")

    def _raise(self, node: Node, message: str) -> typing.NoReturn:
        raise RecipeValueError(f"line {line_of(node)}: {message}" if self._lines else message)


def _hint(node: Node, kind: Any) -> str:
    if node.id != "scalar":
        return ""
    choices = list(_choices(kind))
    if str in choices:
        return "; write it in quotes"
    # `lr: 2,0e-3` is text; in a list in brackets, the comma separates.
    return next((hint for each in (int, float) if each in choices and (hint := number_hint(node.value, each))), "")


def _is_list(kind: Any) -> bool:
    return any(typing.get_origin(each) is list for each in _choices(kind))


def _takes_numbers(kind: Any) -> bool:
    return any(each in (int, float) for each in _choices(kind))


def _choices(kind: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without `None` and `Annotated`."""
    if typing.get_origin(kind) is typing.Annotated:
        yield from _choices(typing.get_args(kind)[0])
    elif is_union(kind):
        for each in typing.get_args(kind):
            yield from _choices(each)
    elif kind is not types.NoneType:
        yield kind


def _names(kind: Any) -> Iterator[str]:
    for each in _choices(kind):
        if typing.get_origin(each) is typing.Literal:
            yield f"one of {', '.join(map(repr, typing.get_args(each)))}"
        else:
            yield _NAMES[typing.get_origin(each) or each]


def _accepts(kind: Any, value: Any) -> bool:
    """Whether jsonargparse takes `value`, as YAML reads it, for the annotation: quoted numbers are numbers."""
    return value is None or any(_accepts_choice(each, value) for each in _choices(kind))


def _accepts_choice(kind: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list) and all(_accepts(arguments[0], each) for each in value)
    if origin is dict:
        key, item = arguments
        return isinstance(value, dict) and all(_accepts(key, a) and _accepts(item, b) for a, b in value.items())
    if kind in (int, float) and isinstance(value, str):
        try:
            return math.isfinite(kind(value))
        except ValueError:
            return False
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _shown(node: Node) -> str:
    """The value as the file has it, and how YAML reads it where that may surprise."""
    if node.id != "scalar":
        return _short(str(construct(node)))
    text = _short(node.value) or "''"
    if node.tag == _BOOL and text not in ("true", "false"):
        return f"{text}, which YAML reads as {str(construct(node)).lower()}"
    if node.tag == _INT and str(construct(node)) != node.value:
        return f"{text}, which YAML reads as {construct(node)}"
    return text


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
