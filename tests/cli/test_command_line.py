"""The command line: help without heavy imports, exit statuses, one line for a user's mistake."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prealign import __version__, cli
from megatron_prealign.errors import UserError

# What makes a start slow; `--help` of every command answers without them.
HEAVY = ("torch", "numpy", "megatron", "transformers", "tokenizers", "matplotlib", "pyarrow")
HELP = """
import sys
from megatron_prealign.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print("HEAVY", [name for name in HEAVY if name in sys.modules])
sys.exit(status)
""".replace("in HEAVY if", f"in {HEAVY} if")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        *[[command, "--help"] for command in cli.COMMANDS],
        *[["dictionary", action, "--help"] for action in ("build", "coverage", "report", "merge", "preview")],
        ["pretrain", "--help", "all"],
        *[["dataset", action, "--help"] for action in ("merge", "inspect", "verify", "repair", "prepare-cache")],
        *[["checkpoint", action, "--help"] for action in ("list", "inspect", "verify", "export-weights")],
        *[["convert", action, "--help"] for action in ("to-hf", "from-hf", "verify")],
        *[
            ["benchmark", action, "--help"]
            for action in ("code-switch", "contrastive", "preprocess", "convert", "resources")
        ],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    done = run_python("-c", HELP, *arguments)
    assert done.returncode == 0, done.stderr
    assert "usage: megatron-prealign" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert done.stderr == ""


def test_module_runs_as_the_command_does() -> None:
    done = run_python("-m", "megatron_prealign", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
    done = run_python("-m", "megatron_prealign", "pretrain", "--config", "no/such/recipe.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: recipe no/such/recipe.yaml: ")


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command, (_, line) in cli.COMMANDS.items():
        assert any(each.split(maxsplit=1) == [command, line] for each in text.splitlines())


def test_no_command_is_a_mistake_that_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    output = capsys.readouterr()
    assert "usage: megatron-prealign COMMAND" in output.out + output.err


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, expected in (
        ("pretrian", "did you mean pretrain?"),
        ("xyz", f"expected one of {', '.join(cli.COMMANDS)}"),
    ):
        assert cli.main([typed]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err == f"error: unknown command {typed}; {expected}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["preprocess", "--foo", "1"],
        ["preprocess"],
        ["train-tokenizer", "--input", "x", "--output", "y", "--vocab-size", "many"],
        ["dictionary", "build", "--input", "nowhere.tsv"],
        ["evaluate", "--run", "no-equals-sign", "--output", "o"],
        ["evaluate", "--run", "a=x", "a=y", "--output", "o"],
        ["doctor", "--json", "perhaps"],
        ["pretrain"],
    ],
    ids=" ".join,
)
def test_mistakes_end_in_one_line_and_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    assert output.err.startswith("error: ")
    assert "<class" not in output.err


def with_command(monkeypatch: pytest.MonkeyPatch, main: Any) -> None:
    """Adds a command `probe` whose module has this `main`."""
    monkeypatch.setitem(sys.modules, "probe_command", SimpleNamespace(main=main))
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "a test"))


@pytest.mark.parametrize(
    ("rank", "agreed", "printed"),
    [
        ("0", True, "error: the file is gone\n"),
        ("0", False, "error: the file is gone\n"),
        ("1", True, ""),
        ("3", False, "error: rank 3: the file is gone\n"),
    ],
)
def test_what_all_ranks_know_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, agreed: bool, printed: str
) -> None:
    def main(argv: Sequence[str]) -> int:
        error = UserError("the file is gone")
        error.agreed = agreed
        raise error

    with_command(monkeypatch, main)
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == printed


def test_file_that_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")

    def main(argv: Sequence[str]) -> int:
        (tmp_path / "file" / "below").mkdir()
        return 0

    with_command(monkeypatch, main)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'file' / 'below'}: Not a directory (NotADirectoryError); check this path, its permissions "
        "and free disk space\n"
    )


def test_full_disk_without_a_file_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        # A device that is always full.
        with open("/dev/full", "w") as stream:
            stream.write("x")
        return 0

    with_command(monkeypatch, main)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == (
        "error: cannot write output: No space left on device; free disk space or choose another path\n"
    )


def test_system_error_without_a_file_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str]) -> int:
        raise ConnectionResetError("by peer")

    with_command(monkeypatch, main)
    with pytest.raises(ConnectionResetError):
        cli.main(["probe"])


def test_status_of_a_command_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: Sequence[str]) -> int:
        seen.append(list(argv))
        return 1

    with_command(monkeypatch, main)
    assert cli.main(["probe", "--x", "1"]) == 1
    assert seen == [["--x", "1"]]


def test_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    with_command(monkeypatch, main)
    assert cli.main(["probe"]) == 130


def test_errors_of_the_program_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str]) -> int:
        raise ZeroDivisionError("a mistake of ours")

    with_command(monkeypatch, main)
    with pytest.raises(ZeroDivisionError):
        cli.main(["probe"])
