"""Turns jsonargparse's errors about a recipe into one line: field, value, expectation.

jsonargparse nests its errors, one level for every section and union, so the parts are spread over the chain of
exceptions. Messages that are not recognised are passed on, joined to one line.
"""

import re
import typing
from collections.abc import Iterator

from megatron_prealign.files.yaml_text import YamlError
from megatron_prealign.recipe.checks import RecipeValueError
from megatron_prealign.recipe.describe import is_union, section_of
from megatron_prealign.recipe.document import SECTION, unknown_field
from megatron_prealign.recipe.recipe import Recipe

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_TYPES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "list": "a list",
    "dict": "a mapping",
}
_NO_SECTION = (
    r"Not a valid subclass of \S+ Got value: (.+?) Subclass types",
    r"Expected a dot import path string: (.+)",
    r"Unable to load config [\"'](.+?)[\"']",
)


def explain(error: BaseException) -> str:
    """Returns a one-line message for `error`, which jsonargparse or the check of a section raised."""
    chain = list(_chain(error))
    for cause in chain:
        if isinstance(cause, RecipeValueError | YamlError):
            return str(cause)
    keys = dict.fromkeys(match[1] for cause in chain if (match := _KEY.match(str(cause))))
    leaf = next((text for cause in reversed(chain) if (text := _one_line(_KEY.sub("", str(cause))))), "unknown error")
    return _rephrase(leaf, ".".join(keys))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _rephrase(leaf: str, field: str) -> str:
    if match := re.match(r"Expected a (.+?)\. Got value: (.*)", leaf):
        return f"{field} is {match[2]}, expected {_choice(field) or _type_name(match[1])}"
    if match := re.match(r"Option '(.+?)' is not accepted", leaf):
        return _unknown(f"{field}.{match[1]}" if field else match[1])
    if match := re.match(r"Group '(.+?)' does not accept option '(.+?)'", leaf):
        return _unknown(f"{match[1]}.{match[2]}")
    if match := re.match(r"the following arguments are required: (.+)", leaf):
        missing = [f"{field}.{name}" if field else name for name in match[1].split(", ")]
        return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required but not set"
    if match := re.match(r"Unexpected config:(.*)", leaf):
        text = match[1].strip() or "an empty file"
        return f"got {text}, expected sections such as `model:` and `data:`"
    if match := re.match(r"argument (--\S+): expected one argument", leaf):
        return f"{match[1].replace('_', '-')} needs a value"
    if leaf.startswith("File does not exist"):
        return "file not found; check the path"
    if leaf.startswith("Path is not a file"):
        return "it is a directory, expected a YAML file"
    for pattern in _NO_SECTION:
        if match := re.match(pattern, leaf):
            return f"{field} is {match[1]}, expected {SECTION}"
    return f"{field}: {leaf}" if field else leaf


def _type_name(text: str) -> str:
    if match := re.match(r"typing\.Literal\[(.+)\]", text):
        return f"one of {match[1]}"
    match = re.match(r"<class '(?:.*\.)?(.+)'>", text)
    return _TYPES.get(match[1], SECTION) if match else text


def _choice(field: str) -> str | None:
    """Names all types that a field with several plain types accepts, because jsonargparse names only the last one it
    tried. None for other fields."""
    *path, name = field.split(".")
    section = _section(path)
    kind = typing.get_type_hints(section).get(name) if section is not None else None
    kinds = [typing.get_origin(each) or each for each in typing.get_args(kind)] if is_union(kind) else []
    names = [_TYPES[each.__name__] for each in kinds if getattr(each, "__name__", None) in _TYPES]
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else None


def _unknown(field: str) -> str:
    """Returns the message about an unknown field, with the closest field name or all of them."""
    *path, name = field.split(".")
    # For `foo.bar` without a section `foo`, the error is about `foo`.
    while (section := _section(path)) is None:
        *path, name = path
    return unknown_field(".".join([*path, name]), section)


def _section(path: list[str]) -> typing.Any:
    """Returns the dataclass of the section at `path` of the recipe; None if there is none."""
    kind: type | None = Recipe
    for name in path:
        kind = section_of(typing.get_type_hints(kind).get(name)) if kind is not None else None
    return kind
