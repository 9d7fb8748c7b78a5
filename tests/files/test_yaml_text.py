"""YAML that people write: what is ambiguous or unbounded is refused in one line that names the place."""

from pathlib import Path
from typing import Any

import pytest
from support.messages import user_error

from megatron_prealign.files.yaml_text import MAX_DEPTH, YamlError, dump_yaml, load_yaml, read_utf8

# Ten billion values in a kilobyte.
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 11))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("# only a comment\n", None),
        ("a: 1e-3\nb: 2024-01-01\n", {"a": 0.001, "b": "2024-01-01"}),
        ("1: a\n'1': b\n", {1: "a", "1": "b"}),
        ("a: &x {l: 1, m: 2}\nb: {<<: *x, l: 3}\n", {"a": {"l": 1, "m": 2}, "b": {"l": 3, "m": 2}}),
        ("a: &x {l: 1}\nb: {<<: [*x, {m: 3}]}\n", {"a": {"l": 1}, "b": {"l": 1, "m": 3}}),
        ("- &x [1]\n" + "- *x\n" * 100, [[1]] * 101),
        ("[" * MAX_DEPTH + "]" * MAX_DEPTH, None),
    ],
)
def test_plain_documents(text: str, value: Any) -> None:
    loaded = load_yaml(text)
    assert loaded == value or text.startswith("[[")


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("a: 1\nb: 2\na: 3\n", ("line 3", "a is already defined (line 1)")),
        ("a:\n  b: 1\n  c: 2\n  b: 1\n", ("line 4", "a.b is already defined (line 2)")),
        ("a:\n- x: 1\n- y: 2\n  x: 1\n  y: 2\n", ("line 5", "a[1].y is already defined (line 3)")),
        ("{a: 1,\n 'a': 2}\n", ("line 2", "a is already defined (line 1)")),
        ("1: a\n0x1: b\n", ("line 2", "0x1 is already defined (line 1)")),
        ("yes: 1\non: 2\n", ("line 2", "on is already defined (line 1)")),
        ("a: &x [*x]\n", ("line 1", "alias of itself")),
        ("a: &x {b: {c: *x}}\n", ("line 1", "a.b.c", "alias of itself")),
        (BOMB, ("line 6", "more than 100,000 values", "aliases")),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), ("line 1", f"{MAX_DEPTH} nested levels")),
        ("[" * 100_000, ("line 1", "nest")),
        ("a:\n\tb: 1\n", ("line 2", "a tab", "spaces")),
        ("a:\n\u00a0\u00a0b: 1\n  c: 2\n", ("line 2", "no-break space")),
        ("a: 1\nb: \x07\n", ("line 2, column 4", "U+0007")),
        ("a: [1,\nb: 2\n", ("line 3, column 1", "did not find expected ',' or ']'", "(line 1)")),
        ("a: 1\n---\nb: 2\n", ("line 2", "another document")),
        ("? [a]\n: b\n", ("line 1", "key is a sequence")),
        ("a:\n  <<: 3\n", ("line 2", "<<", "mapping")),
        ("a: *x\n", ("line 1", "alias")),
        ("a: !!python/object/apply:os.getcwd []\n", ("line 1", "python/object")),
        ("a: !!int x\n", ("line 1", "'x'")),
    ],
)
def test_refused_in_one_line_and_at_once(text: str, facts: tuple[str, ...]) -> None:
    with user_error(*facts, kind=YamlError):
        load_yaml(text)


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("a: 1\nname: für\n".encode("latin-1"))
    with user_error("line 2, column 8", "0xfc", "UTF-8", kind=YamlError):
        read_utf8(file)
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_yaml(read_utf8(file)) == {"a": 1}


def test_text_that_looks_like_a_number_stays_text() -> None:
    value = {"b": ["1e3", "-2E+5", "1.0e+3", "017", "1:30", "2024-01-01", "yes", "null", "~", "1e"], "a": [1e-5, 1e300]}
    assert load_yaml(dump_yaml(value)) == value
    assert list(load_yaml(dump_yaml(value))) == ["b", "a"]
