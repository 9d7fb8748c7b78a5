"""The parts under every benchmark: clocks, facts about the machine, tables, and the command around them."""

import csv
from pathlib import Path

import pytest
import torch

from megatron_prealign import __version__
from megatron_prealign.benchmark import kernel_resources, machine, timing
from megatron_prealign.benchmark.report import align, write_csv
from megatron_prealign.cli import main
from megatron_prealign.kernels._triton import HAS_TRITON, INTERPRETED

CPU = torch.device("cpu")


def test_summary_is_in_microseconds() -> None:
    found = timing.summarise([each * 1e-6 for each in range(11)])
    assert found.repeats == 11
    # floats that went through seconds and back
    assert [round(each, 9) for each in found[:3]] == [5.0, 1.0, 9.0]


def test_slow_calls_are_repeated_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[None] = []
    assert timing.time_call(lambda: calls.append(None), 7, CPU).repeats == 7
    assert len(calls) == timing.WARM_UP + 7
    monkeypatch.setattr(timing, "LIMIT_S", 0.0)
    assert timing.time_host(lambda: None, 7, CPU).repeats == timing.LEAST_REPEATS


def test_threads_come_back() -> None:
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
    found = timing.time_replays(captured, 5, timing.flush_buffer(source.device))
    assert found.repeats == 5 and found.p10_us <= found.median_us <= found.p90_us
    assert torch.equal(captured.output, source + 1)


def test_facts_about_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = machine.describe_machine(CPU)
    assert found.gpu == found.driver == found.capability == ""
    assert found.cpu and found.cores >= 1 and found.torch == torch.__version__ and found.date.endswith(" UTC")
    # an environment inside another checkout: its commit is not ours
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


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")
def test_resources_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        (
            ["codeswitch"],
            2,
            "unknown action codeswitch; did you mean code-switch?",
        ),
        (["resources", "--capability", "9"], 2, "--capability is 9, expected 80 (A100) to 121"),
        (["resources", "--output", "no/x.csv"], 2, "--output no/x.csv lies in no, which is no directory"),
    ],
)
def test_help_and_mistakes(arguments: list[str], status: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *arguments]) == status
    captured = capsys.readouterr()
    assert text in captured.out + captured.err
