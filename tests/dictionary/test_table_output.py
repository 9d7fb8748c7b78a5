"""What commands write: nothing of the user's is lost, and a disk that refuses is one line."""

import json
import re
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_prealign.cli import main
from megatron_prealign.dictionary.table_output import check_table_output
from megatron_prealign.errors import UserError


def arguments(action: str, directory: Path, tokenizer, output: Path) -> list[str]:
    """Of a command that writes a table; what it reads is made."""
    (directory / "a.tsv").write_text("apple\tApfel\nhouse\tHaus\n")
    given = ["dictionary", action, "--tokenizer", str(tokenizer.path), "--output", str(output)]
    if action == "build":
        return [*given, "--input", f"{directory}/a.tsv:en-de"]
    assert main(arguments("build", directory, tokenizer, directory / "one.safetensors")) == 0
    return [*given, "--table", f"{directory}/one.safetensors", f"{directory}/one.safetensors"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files may not grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def safetensors(header: object) -> bytes:
    data = json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data


@pytest.mark.parametrize("action", ["build", "merge"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"tokenizer: x\n", "a text file"),
        (b"", "an empty file"),
        (b"PK\3\4\0\0\0\0", "a file of another kind"),
        (safetensors({"w": {}, "__metadata__": {"format_version": "1"}}), "a safetensors file of something else"),
        (safetensors({"x": [{}]}), "a safetensors file of something else"),
        (b"\2\0\0\0\0\0\0\0{]", "a safetensors file of something else"),
        (None, "a directory"),
    ],
    ids=["text", "empty", "zip", "version", "tensors", "broken", "directory"],
)
def test_other_files_are_not_overwritten(action, content, kind, tokenizer, tmp_path, capsys):
    output = tmp_path / "recipe.yaml"
    given = arguments(action, tmp_path, tokenizer, output)
    capsys.readouterr()
    output.mkdir() if content is None else output.write_bytes(content)
    # Before the work: there is no such tokenizer.
    given[given.index("--tokenizer") + 1] = str(tmp_path / "none")
    assert main(given) == 2
    message = f"error: --output is {output}, {kind}, which is not overwritten; choose another path for the table\n"
    assert capsys.readouterr().err == message
    assert content is None or output.read_bytes() == content


def test_older_tables_are_overwritten(tokenizer, tmp_path):
    output = tmp_path / "table.safetensors"
    given = arguments("build", tmp_path, tokenizer, output)
    assert main(given) == 0
    table = output.read_bytes()
    # Of a version of before, and damaged.
    texts = {"format_version": "1", "languages": "[]", "tokenizer_fingerprint": "x", "vocab_size": "3"}
    for older in (table, table[:-9], safetensors({"__metadata__": texts})):
        output.write_bytes(older)
        assert main(given) == 0
        assert output.read_bytes() == table


def test_devices_are_not_overwritten():
    with pytest.raises(UserError, match="--output is /dev/null, no regular file"):
        check_table_output("/dev/null")


@pytest.mark.parametrize("action", ["build", "merge"])
def test_directories_that_take_no_files(action, tokenizer, tmp_path, capsys):
    # Nobody, not even root, can write there.
    given = arguments(action, tmp_path, tokenizer, Path("/proc/new/table.safetensors"))
    capsys.readouterr()
    given[given.index("--tokenizer") + 1] = str(tmp_path / "none")
    assert main(given) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: cannot write --output /proc/new/table\.safetensors: [^\n]*\n", error)
    assert ".tmp" not in error


@pytest.mark.parametrize("action", ["build", "merge"])
@pytest.mark.parametrize("size", [0, 1000])
def test_a_table_on_a_full_disk(action, size, tokenizer, tmp_path, capsys):
    output = tmp_path / "new" / "directory" / "table.safetensors"
    given = arguments(action, tmp_path, tokenizer, output)
    capsys.readouterr()
    with largest_file(size):
        assert main(given) == 2
    line = f"error: cannot write dictionary table {output}: File too large; free disk space"
    error = capsys.readouterr().err
    # Before it the bar of the work.
    assert error.splitlines()[-1].startswith(line) and "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_pages_on_a_full_disk(tokenizer, tmp_path, make_dataset, capsys):
    table = tmp_path / "table.safetensors"
    assert main(arguments("build", tmp_path, tokenizer, table)) == 0
    corpus = str(make_dataset(tokenizer, ["an apple, a house " * 20], "en"))
    page, directory = tmp_path / "new" / "page.html", tmp_path / "report"
    commands = {
        "page": ("preview", ["--data", corpus, "--seq-length", "16", "--rows", "2", "--html", str(page)], page),
        "report": ("report", ["--corpus", corpus, "--output", str(directory)], directory / "report.html"),
    }
    assert main(["dictionary", "report", "--table", str(table), *commands["report"][1]]) == 0
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    for what, (action, options, path) in commands.items():
        capsys.readouterr()
        with largest_file(500):
            assert main(["dictionary", action, "--table", str(table), *options]) == 2
        line = f"error: cannot write {what} {path}: File too large; free disk space"
        assert re.fullmatch(re.escape(line) + r"[^\n]*\n", capsys.readouterr().err)
    assert not page.parent.exists()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
