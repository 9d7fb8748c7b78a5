"""`megatron-prealign benchmark contrastive` on the CPU: what it computes and writes; times are never compared."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_prealign.benchmark import memory
from megatron_prealign.benchmark.contrastive import (
    ContrastiveBenchmark,
    ContrastiveMeasurement,
    check_equal,
    compare,
)
from megatron_prealign.benchmark.machine import Machine
from megatron_prealign.benchmark.options import ContrastiveOptions
from megatron_prealign.cli import main
from megatron_prealign.kernels import contrastive_loss

SMALL = ["benchmark", "contrastive", "--device", "cpu", "--no-compiled", "--repeats", "1"]


def test_command_writes_the_promised_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "figures.csv"
    cases = ["--words", "40", "70", "--hidden", "16", "24", "--layers", "2", "--dtype", "both"]
    assert main([*SMALL, *cases, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "70 words x 24, 2 layers, bfloat16:" in printed and "threads   1" in printed
    assert "versions  megatron-prealign " in printed and f"wrote {output}" in printed
    with output.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == [
        field.name for kind in (ContrastiveMeasurement, Machine) for field in dataclasses.fields(kind)
    ]
    assert [(row["words"], row["hidden"], row["dtype"], row["implementation"]) for row in rows] == [
        (words, hidden, dtype, implementation)
        for words in ("40", "70")
        for hidden in ("16", "24")
        for dtype in ("float32", "bfloat16")
        for implementation in ("eager", "chunked")
    ]
    for row in rows:
        work = 6 * 2 * int(row["words"]) ** 2 * int(row["hidden"])
        # both were rounded to six digits
        assert float(row["teraflops"]) == pytest.approx(work / float(row["median_us"]) / 1e6, rel=1e-4)
        assert float(row["fastest_us"]) <= float(row["median_us"]) and row["torch"] == torch.__version__
        assert row["largest_words"] == row["gpu"] == ""


def test_a_wrong_implementation_is_not_timed() -> None:
    options = ContrastiveOptions(device="cpu", words=[40], hidden=[16], compiled=False, repeats=1)
    benchmark = ContrastiveBenchmark(options)
    benchmark._losses["eager"] = lambda *call, temperature: contrastive_loss(*call, temperature=1.01 * temperature)
    with pytest.raises(RuntimeError, match="eager: the loss is .* off what the strips give"):
        next(benchmark.cases())


def test_what_is_wrong_is_told() -> None:
    expected = (torch.ones(2), torch.ones(2, 3, 4))

    def changed(place: int, by: float) -> tuple[Tensor, Tensor]:
        loss, gradient = (each.clone() for each in expected)
        (loss, gradient)[place].view(-1)[0] += by
        return loss, gradient

    check_equal("kernel", changed(1, 1e-5), expected)
    for place, what in ((0, "loss"), (1, "gradient")):
        for by in (1e-2, float("nan")):
            with pytest.raises(RuntimeError, match=f"kernel: the {what} is"):
                check_equal("kernel", changed(place, by), expected)


def test_an_implementation_out_of_memory_is_left_empty() -> None:
    options = ContrastiveOptions(device="cpu", words=[40], hidden=[16], compiled=False, repeats=1)
    benchmark = ContrastiveBenchmark(options)

    def full(*call: object, temperature: float) -> Tensor:
        raise torch.OutOfMemoryError("full")

    benchmark._losses["eager"] = full
    (measured,) = benchmark.cases()
    eager, chunked = measured
    assert eager.median_us is eager.peak_bytes is None and eager.repeats == 0
    assert chunked.median_us is not None and chunked.times_eager is None


def test_ratios() -> None:
    common = {"device": "cpu", "words": 2, "hidden": 2, "layers": 1, "dtype": "float32", "threads": 1}
    names = {"eager": 6.0, "compiled": 3.0, "chunked": 2.0}
    found = compare([ContrastiveMeasurement(implementation=name, median_us=us, **common) for name, us in names.items()])
    assert [(each.times_eager, each.times_compiled) for each in found] == [(1.0, 0.5), (2.0, 1.0), (3.0, 1.5)]


def test_memory_that_a_call_takes() -> None:
    size = 64 << 20
    taken = memory.peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), torch.device("cpu"))
    if taken is not None:
        # Python's own objects are far below a tenth; the kernel counts pages a few at a time
        assert 0.9 * size <= taken < 1.1 * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--words", "600", "--hidden", "96", "--dtype", "both", "--repeats", "2"]
    assert main(["benchmark", "contrastive", *arguments]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert lines.count("kernel") == lines.count("eager") == lines.count("compiled") == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--words", "1"], "--words is 1, expected numbers from 2"),
        (["--hidden", "0"], "--hidden is 0, expected numbers from 1"),
        (["--layers", "0"], "--layers is 0, expected at least 1"),
        (["--threads", "0"], "--threads is 0, expected at least 1"),
        (["--seed", "-1"], "--seed is -1, expected 0"),
        (["--repeats", "0"], "--repeats is 0, expected at least 1"),
        (["--largest"], "--largest is given without a GPU"),
        (["--output", "no/directory/x.csv"], "--output no/directory/x.csv lies in no/directory, which is no directory"),
        (["--dtype", "float16"], "--dtype is float16, expected one of float32, bfloat16, both"),
    ],
    ids=" ".join,
)
def test_bad_options_end_in_one_line(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "contrastive", "--device", "cpu", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1 and text in captured.err
