"""The command line: help without heavy imports, exit statuses, one-line user errors."""

import mmap
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.messages import assert_refused

from megatron_prealign import __version__, cli
from megatron_prealign.errors import UserError

# Libraries that are slow to import; no `--help` may import them.
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
        *[
            ["dictionary", action, "--help"]
            for action in ("build", "coverage", "report", "merge", "preview", "shuffle")
        ],
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


def test_module_runs_like_the_command() -> None:
    done = run_python("-m", "megatron_prealign", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")
    done = run_python("-m", "megatron_prealign", "pretrain", "--config", "no/such/recipe.yaml")
    assert done.stdout == ""
    assert_refused(done.returncode, done.stderr, "error: recipe no/such/recipe.yaml: ")


def test_usage_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command, (_, line) in cli.COMMANDS.items():
        assert any(each.split(maxsplit=1) == [command, line] for each in text.splitlines())


def test_no_command_is_an_error_that_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    output = capsys.readouterr()
    assert "usage: megatron-prealign COMMAND" in output.out + output.err


def test_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for typed, expected in (("pretrian", "pretrain?"), ("xyz", ", ".join(cli.COMMANDS))):
        status = cli.main([typed])
        output = capsys.readouterr()
        assert output.out == ""
        assert_refused(status, output.err, "error: unknown command", typed, expected)


@pytest.mark.parametrize(("typed", "fact"), [("--verison", "--version?"), ("-V", "--help or --version")])
def test_unknown_option_before_a_command(typed: str, fact: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(cli.main([typed]), capsys.readouterr().err, "unknown option", typed, fact)


def test_help_is_also_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help"]) == 0
    assert "usage: megatron-prealign COMMAND" in capsys.readouterr().out


def test_files_that_are_no_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n")
    for path, fact in (
        (tmp_path, "directory"),
        (tmp_path / "picture.png", "not UTF-8"),
        (tmp_path / "no", "not found"),
    ):
        assert_refused(cli.main(["pretrain", "--config", str(path)]), capsys.readouterr().err, path, fact)
    assert_refused(cli.main(["pretrain"]), capsys.readouterr().err, "--config FILE")


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
def test_user_errors_are_one_line_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(arguments)
    output = capsys.readouterr()
    assert output.out == ""
    assert_refused(status, output.err)
    assert output.err.startswith("error: ")
    assert "<class" not in output.err


def with_command(monkeypatch: pytest.MonkeyPatch, main: Any) -> None:
    """Adds a command `probe` whose module has this `main`."""
    monkeypatch.setitem(sys.modules, "probe_command", SimpleNamespace(main=main))
    monkeypatch.setitem(cli.COMMANDS, "probe", ("probe_command", "a test"))


@pytest.mark.parametrize(
    ("rank", "agreed", "printed"),
    [
        ("0", True, "error: file is missing\n"),
        ("0", False, "error: file is missing\n"),
        ("1", True, ""),
        ("3", False, "error: rank 3: file is missing\n"),
    ],
)
def test_error_of_all_ranks_is_printed_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, agreed: bool, printed: str
) -> None:
    def main(argv: Sequence[str]) -> int:
        # Names in a message are as users wrote them.
        error = UserError("file\nis missing")
        error.agreed = agreed
        raise error

    with_command(monkeypatch, main)
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == printed


def test_the_report_of_torchrun_contains_the_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def main(argv: Sequence[str]) -> int:
        raise UserError("file is missing")

    with_command(monkeypatch, main)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert cli.main(["probe"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert "error: file is missing" in str(ChildFailedError("probe", {0: failure}))
    # A directory that torchrun has removed changes nothing.
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    assert cli.main(["probe"]) == 2


def test_system_error_about_a_file_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")

    def main(argv: Sequence[str]) -> int:
        (tmp_path / "file" / "below").mkdir()
        return 0

    with_command(monkeypatch, main)
    status = cli.main(["probe"])
    assert_refused(status, capsys.readouterr().err, "error: ", tmp_path / "file" / "below", "Not a directory")


def test_full_disk_without_a_file_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        # /dev/full fails every write with ENOSPC.
        with open("/dev/full", "w") as stream:
            stream.write("x")
        return 0

    with_command(monkeypatch, main)
    status = cli.main(["probe"])
    assert_refused(status, capsys.readouterr().err, "error: ", "output", "No space left on device")


def test_system_error_without_a_file_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str]) -> int:
        raise ConnectionResetError("by peer")

    with_command(monkeypatch, main)
    with pytest.raises(ConnectionResetError):
        cli.main(["probe"])


def test_exit_status_of_a_command_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def main(argv: Sequence[str]) -> int:
        seen.append(list(argv))
        return 1

    with_command(monkeypatch, main)
    assert cli.main(["probe", "--x", "1"]) == 1
    assert seen == [["--x", "1"]]


def test_interrupt_prints_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str]) -> int:
        raise KeyboardInterrupt

    with_command(monkeypatch, main)
    assert cli.main(["probe"]) == 130


def test_gpu_memory_that_is_used_up_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        # As the allocator of torch 2.13 words it.
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 1 has a total capacity of 139.72 GiB of which 12.00 "
            "MiB is free. Including non-PyTorch memory, this process has 139.70 GiB memory in use."
        )

    with_command(monkeypatch, main)
    assert_refused(
        cli.main(["probe"]),
        capsys.readouterr().err,
        "out of memory on GPU 1 (139.72 GiB, 12.00 MiB free): tried to allocate 20.00 MiB;",
        "training.micro_batch_size",
    )


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_gpu_memory_that_the_driver_refuses_is_one_line(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: Sequence[str]) -> int:
        raise RuntimeError(f"{message}\nCUDA kernel errors might be asynchronously reported at some other API call")

    with_command(monkeypatch, main)
    error = message.split(" when")[0]
    assert_refused(
        cli.main(["probe"]), capsys.readouterr().err, f"out of memory on a GPU ({error});", "training.micro_batch_size"
    )


def test_internal_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(argv: Sequence[str]) -> int:
        raise RuntimeError("a bug")

    with_command(monkeypatch, main)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["probe"])


@pytest.mark.parametrize(
    ("allocate", "fact"),
    [
        # 4 and 7 PiB, and more bytes than a 64-bit number holds.
        (lambda: torch.empty(1 << 50), f"{4 << 50} bytes"),
        (lambda: np.empty(10**15), "(1000000000000000,)"),
        (lambda: torch.empty(1 << 42, 1 << 42), "Storage size"),
        (lambda: mmap.mmap(-1, 1 << 50), "Cannot allocate memory"),
    ],
    ids=["torch", "numpy", "overflow", "system"],
)
def test_memory_that_the_system_refuses_is_one_line(
    allocate: Callable[[], object], fact: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_command(monkeypatch, lambda argv: allocate() and 0)
    assert_refused(cli.main(["probe"]), capsys.readouterr().err, "out of memory", fact)
