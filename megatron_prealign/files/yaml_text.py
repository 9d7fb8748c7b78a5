"""Reads YAML that people write: a key defined twice is an error, aliases and nesting are bounded, errors name the line.

PyYAML silently keeps the last of two equal keys, turns nested aliases into a structure that takes hours to walk, and
recurses without bound.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

Node: TypeAlias = Any
"""A node of PyYAML, whose stubs lack `id`: scalar, sequence or mapping."""

MAX_DEPTH = 50
"""Nested mappings and lists."""
MAX_NODES = 100_000
"""Keys and values, where an alias counts as often as it repeats its anchor."""
_MERGE = "tag:yaml.org,2002:merge"
_TEXT = "tag:yaml.org,2002:str"
# PyYAML reads 1e-3 as text, because YAML 1.1 requires a dot.
_EXPONENT_RESOLVER = (
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
# A byte order mark that precedes the text is removed, so one in it is visible to no editor.
_NOT_ALLOWED = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_NOT_PRINTABLE = {"\t": "a tab", "\xa0": "a no-break space", "\u3000": "an ideographic space"}


class YamlError(ValueError):
    """Text that is not valid YAML, or ambiguous. The message is one line that starts with the place."""


def read_utf8(path: Path) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Raises:
        YamlError: the file is not UTF-8 text.
        OSError: the file cannot be read.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise YamlError(
            f"line {line}, column {column}: byte 0x{content[error.start]:02x} is not UTF-8 text; save the file as UTF-8"
        ) from None


def load_yaml(text: str) -> Any:
    """Parses one YAML document to plain values; None if it is empty.

    Raises:
        YamlError: see `compose_yaml`; or a value is not a plain one, such as `!!python/object`.
    """
    node = compose_yaml(text)
    return None if node is None else construct(node)


def dump_yaml(value: Any) -> str:
    """YAML of a plain value, in the order of its keys; `load_yaml` returns an equal value."""
    import yaml

    return yaml.dump(value, Dumper=_dumper(), sort_keys=False, allow_unicode=True)


def compose_yaml(text: str) -> Node:
    """Parses one YAML document to PyYAML's nodes, which know their lines; None if it is empty.

    Raises:
        YamlError: the text is not valid YAML, defines a key twice, or exceeds the bounds.
    """
    import yaml

    if match := _NOT_ALLOWED.search(text):
        line = text.count("\n", 0, match.start()) + 1
        column = match.start() - text.rfind("\n", 0, match.start())
        raise YamlError(f"line {line}, column {column}: character U+{ord(match[0]):04X} is not allowed in YAML")
    try:
        root: Node = yaml.compose(text, Loader=_loader())
    except yaml.MarkedYAMLError as error:
        raise YamlError(_explain(error, text)) from None
    except RecursionError:
        raise YamlError(f"the file nests more than {MAX_DEPTH} levels of mappings and lists") from None
    if root is not None:
        _Checks().count(root, "", 0)
    return root


def construct(node: Node) -> Any:
    """Plain value of a node of `compose_yaml`.

    Raises:
        YamlError: a value is not a plain one.
    """
    import yaml

    loader = _loader()("")
    try:
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        raise YamlError(f"{_place(error.problem_mark)}: invalid YAML: {error.problem}") from None
    except ValueError as error:
        raise YamlError(f"line {line_of(node)}: invalid YAML: {error}") from None
    finally:
        loader.dispose()


def entries(mapping: Node) -> Iterator[tuple[Node, Node]]:
    """Keys and values of a mapping, and those of its merge keys (`<<`) that it does not set itself."""
    own = {(key.tag, key.value) for key, _ in mapping.value}
    for key, value in mapping.value:
        if key.tag != _MERGE:
            yield key, value
            continue
        for merged in value.value if value.id == "sequence" else [value]:
            for merged_key, merged_value in entries(merged):
                if (merged_key.tag, merged_key.value) not in own:
                    own.add((merged_key.tag, merged_key.value))
                    yield merged_key, merged_value


def line_of(node: Node) -> int:
    """Line of a node, from 1."""
    return int(node.start_mark.line) + 1


class _Checks:
    """Checks composed nodes."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._open: set[int] = set()

    def count(self, node: Node, path: str, depth: int) -> int:
        """Returns the number of keys and values, with repeated aliases.

        Raises:
            YamlError: a key is defined twice or is not a scalar, an alias contains itself, or a bound is exceeded.
        """
        where = f"line {line_of(node)}"
        if node.id == "scalar":
            return 1
        if id(node) in self._open:
            raise YamlError(f"{where}: {path or 'the anchor'} contains an alias of itself")
        if depth >= MAX_DEPTH:
            raise YamlError(f"{where}: more than {MAX_DEPTH} nested levels of mappings and lists")
        if id(node) not in self._counts:
            self._open.add(id(node))
            total = 1 + sum(self._parts(node, path, depth + 1))
            self._open.remove(id(node))
            if total > MAX_NODES:
                raise YamlError(f"{where}: more than {MAX_NODES:,} values once aliases are resolved; use fewer aliases")
            self._counts[id(node)] = total
        return self._counts[id(node)]

    def _parts(self, node: Node, path: str, depth: int) -> Iterator[int]:
        if node.id == "sequence":
            for number, item in enumerate(node.value):
                yield self.count(item, f"{path}[{number}]", depth)
            return
        seen: dict[tuple[str, Any], int] = {}
        for key, value in node.value:
            if key.id != "scalar":
                raise YamlError(f"line {line_of(key)}: a key is a {key.id}, expected a name or number")
            if key.tag == _MERGE:
                self._check_merged(value)
            name = f"{path}.{key.value}" if path else key.value
            same = (key.tag, key.value if key.tag in (_TEXT, _MERGE) else construct(key))
            if same in seen:
                raise YamlError(f"line {line_of(key)}: {name} is already defined (line {seen[same]})")
            seen[same] = line_of(key)
            yield 1 + self.count(value, name, depth)

    def _check_merged(self, value: Node) -> None:
        for each in value.value if value.id == "sequence" else [value]:
            if each.id != "mapping":
                raise YamlError(f"line {line_of(each)}: << merges a {each.id}, expected a mapping")


@lru_cache
def _loader() -> Any:
    """PyYAML's safe loader, which here reads 1e-3 as a number and dates as text."""
    import yaml

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    Loader.add_implicit_resolver(*_EXPONENT_RESOLVER)
    return Loader


@lru_cache
def _dumper() -> Any:
    """PyYAML's safe dumper, which here quotes the text 1e3."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    Dumper.add_implicit_resolver(*_EXPONENT_RESOLVER)
    return Dumper


def _place(mark: Any) -> str:
    return f"line {mark.line + 1}, column {mark.column + 1}"


def _explain(error: Any, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    lines = text.split("\n")
    # YAML reads a line that is indented otherwise as the continuation of a value, and reports the next one.
    for number in (mark.line, mark.line - 1):
        line = lines[number] if 0 <= number < len(lines) else ""
        indentation = line[: len(line) - len(line.lstrip())]
        for character, name in _NOT_PRINTABLE.items():
            if character in indentation:
                return f"line {number + 1}: the indentation contains {name}; YAML is indented with spaces"
    context = f" {error.context} (line {error.context_mark.line + 1})" if error.context_mark is not None else ""
    return f"{_place(mark)}: invalid YAML: {error.problem}{context}"
