"""Output of commands: other files are not overwritten, and write errors are reported in one line."""

import json
import resource
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.messages import assert_facts, assert_refused, user_error

from megatron_prealign.cli import main
from megatron_prealign.dictionary.table_output import check_table_output


def arguments(action: str, directory: Path, tokenizer, output: Path) -> list[str]:
    """Arguments of a command that writes a table; creates its inputs."""
    (directory / "a.tsv").write_text("apple\tApfel\nhouse\tHaus\n")
    common = ["dictionary", action, "--tokenizer", str(tokenizer.path), "--output", str(output)]
    if action == "build":
        return [*common, "--input", f"{directory}/a.tsv:en-de"]
    assert main(arguments("build", directory, tokenizer, directory / "one.safetensors")) == 0
    return [*common, "--table", f"{directory}/one.safetensors", f"{directory}/one.safetensors"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limits file sizes to `size` bytes, as on a full disk."""
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
        (b"PK\3\4\0\0\0\0", "a binary file"),
        (safetensors({"w": {}, "__metadata__": {"format_version": "1"}}), "another safetensors file"),
        (safetensors({"x": [{}]}), "another safetensors file"),
        (b"\2\0\0\0\0\0\0\0{]", "another safetensors file"),
        (None, "a directory"),
    ],
    ids=["text", "empty", "zip", "version", "tensors", "broken", "directory"],
)
def test_other_files_are_not_overwritten(action, content, kind, tokenizer, tmp_path, capsys):
    output = tmp_path / "recipe.yaml"
    command = arguments(action, tmp_path, tokenizer, output)
    capsys.readouterr()
    output.mkdir() if content is None else output.write_bytes(content)
    # The output is checked first: the tokenizer does not exist.
    command[command.index("--tokenizer") + 1] = str(tmp_path / "none")
    status = main(command)
    assert_refused(status, capsys.readouterr().err, f"error: --output {output}: got {kind},")
    assert content is None or output.read_bytes() == content


def test_older_tables_are_overwritten(tokenizer, tmp_path):
    output = tmp_path / "table.safetensors"
    command = arguments("build", tmp_path, tokenizer, output)
    assert main(command) == 0
    table = output.read_bytes()
    # A table, a truncated table, and a table of an older version.
    texts = {"format_version": "1", "languages": "[]", "tokenizer_fingerprint": "x", "vocab_size": "3"}
    for older in (table, table[:-9], safetensors({"__metadata__": texts})):
        output.write_bytes(older)
        assert main(command) == 0
        assert output.read_bytes() == table


def test_devices_are_not_overwritten():
    with user_error("--output /dev/null", "special file"):
        check_table_output("/dev/null")


@pytest.mark.parametrize("action", ["build", "merge"])
def test_unwritable_directories(action, tokenizer, tmp_path, capsys):
    # Not even root can write to /proc.
    command = arguments(action, tmp_path, tokenizer, Path("/proc/new/table.safetensors"))
    capsys.readouterr()
    command[command.index("--tokenizer") + 1] = str(tmp_path / "none")
    status = main(command)
    error = capsys.readouterr().err
    assert_refused(status, error, "error: cannot ", "--output /proc/new/table.safetensors")
    assert ".tmp" not in error


@pytest.mark.parametrize("action", ["build", "merge"])
@pytest.mark.parametrize("size", [0, 1000])
def test_a_table_on_a_full_disk(action, size, tokenizer, tmp_path, capsys):
    output = tmp_path / "new" / "directory" / "table.safetensors"
    command = arguments(action, tmp_path, tokenizer, output)
    capsys.readouterr()
    with largest_file(size):
        assert main(command) == 2
    error = capsys.readouterr().err
    # The lines before are the progress bar.
    assert_facts(error.splitlines()[-1], "error: cannot write", f"dictionary table {output}", "File too large")
    assert "Traceback" not in error
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
            status = main(["dictionary", action, "--table", str(table), *options])
        assert_refused(status, capsys.readouterr().err, "error: cannot write", f"{what} {path}", "File too large")
    assert not page.parent.exists()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
