"""Common parts of all benchmarks: timing, machine info, tables and the command line."""

import csv
from pathlib import Path

import pytest
import torch
from support.messages import assert_refused

from megatron_prealign import __version__
from megatron_prealign.benchmark import kernel_resources, machine, timing
from megatron_prealign.benchmark.report import write_csv
from megatron_prealign.cli import main
from megatron_prealign.kernels._triton import HAS_TRITON, INTERPRETED
from megatron_prealign.text import align

CPU = torch.device("cpu")


def test_summary_is_in_microseconds() -> None:
    summary = timing.summarise([each * 1e-6 for each in range(11)])
    assert summary.repeats == 11
    # Rounded because of the conversion to seconds and back.
    assert [round(each, 9) for each in summary[:3]] == [5.0, 1.0, 9.0]


def test_slow_calls_are_repeated_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    assert timing.time_call(lambda: calls.append(None), 7, CPU).repeats == 7
    assert len(calls) == timing.WARM_UP + 7
    monkeypatch.setattr(timing, "LIMIT_S", 0.0)
    assert timing.time_host(lambda: None, 7, CPU).repeats == timing.MIN_REPEATS


def test_number_of_threads_is_restored() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ZeroDivisionError), timing.one_thread():
            assert torch.get_num_threads() == 1
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_of_a_graph_write_its_output() -> None:
    source = torch.ones(1000, device="cuda")
    captured = timing.capture(lambda: source + 1, 3)
    source.fill_(4)
    replays = timing.time_replays(captured, 5, timing.flush_buffer(source.device))
    assert replays.repeats == 5 and replays.p10_us <= replays.median_us <= replays.p90_us
    assert torch.equal(captured.output, source + 1)


def test_machine_info(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = machine.describe_machine(CPU)
    assert info.gpu == info.driver == info.capability == ""
    assert info.cpu and info.cores >= 1 and info.torch == torch.__version__ and info.date.endswith(" UTC")
    # An environment inside another checkout: the commit of that checkout is not reported.
    elsewhere = tmp_path / "site-packages" / "megatron_prealign"
    monkeypatch.setattr(machine.megatron_prealign, "__file__", str(elsewhere / "__init__.py"))
    monkeypatch.setattr(machine, "_first_line", lambda command: str(tmp_path))
    assert machine.describe_machine(CPU).commit == ""
    monkeypatch.setattr(machine, "_first_line", lambda command: str(elsewhere.parent))
    assert machine.describe_machine(CPU).commit == f"{elsewhere.parent}-dirty"


def test_table_and_csv(tmp_path: Path) -> None:
    assert align([("a", "long heading"), ("wide cell", "1")]) == ["a          long heading", "wide cell             1"]
    write_csv(tmp_path / "x.csv", [{"name": "a, b", "value": 1234.56789, "none": None, "count": 12345678}])
    assert (tmp_path / "x.csv").read_text() == 'name,value,none,count\n"a, b",1234.57,,12345678\n'


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")
def test_resources_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One setting of each kernel; compiling all takes three times as long.
    monkeypatch.setattr(kernel_resources, "SETTINGS", kernel_resources.SETTINGS[:1])
    many = {"bfloat16 many": kernel_resources.CONTRASTIVE_SETTINGS["bfloat16 many"]}
    monkeypatch.setattr(kernel_resources, "CONTRASTIVE_SETTINGS", many)
    output = tmp_path / "resources.csv"
    assert main(["benchmark", "resources", "--capability", "90", "--output", str(output)]) == 0
    assert "code_switch_row_kernel" in capsys.readouterr().out
    with output.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    kernels = ("code_switch_row_kernel", "decide_blocks_kernel", "write_blocks_kernel")
    contrastive = ("row_sums_kernel", "weights_kernel", "weighted_sums_kernel")
    expected = [(setting, kernel) for setting in kernel_resources.SETTINGS for kernel in kernels]
    expected += [(setting, kernel) for setting in kernel_resources.CONTRASTIVE_SETTINGS for kernel in contrastive]
    assert [(row["setting"], row["kernel"]) for row in rows] == expected
    for row in rows:
        assert row["capability"] == "90" and int(row["registers"]) > 8 and row["spills"] == "0"
        assert row["triton"] and row["version"] == __version__ and row["date"]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--help"], 0, "\n  code-switch "),
        ([], 2, "usage: megatron-prealign benchmark ACTION"),
    ],
)
def test_help(arguments: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *arguments]) == status
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["codeswitch"], ("unknown action codeswitch", "code-switch?")),
        (["resources", "--capability", "9"], ("--capability is 9", "80 (A100) to 121")),
        (["resources", "--output", "no/x.csv"], ("--output no/x.csv", "no is not an existing directory")),
    ],
)
def test_invalid_arguments(arguments: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["benchmark", *arguments])
    assert_refused(status, capsys.readouterr().err, *facts)
