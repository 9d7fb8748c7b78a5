"""`megatron-prealign benchmark contrastive` on the CPU: results and output files; times are never compared."""

import csv
import dataclasses
from pathlib import Path

import pytest
import torch
from support.messages import assert_refused, user_error
from torch import Tensor

from megatron_prealign.benchmark import memory
from megatron_prealign.benchmark.contrastive import (
    ContrastiveBenchmark,
    ContrastiveMeasurement,
    check_close,
    compare,
)
from megatron_prealign.benchmark.machine import Machine
from megatron_prealign.benchmark.options import ContrastiveOptions
from megatron_prealign.cli import main
from megatron_prealign.kernels import contrastive_loss

SMALL = ["benchmark", "contrastive", "--device", "cpu", "--no-compiled", "--repeats", "1"]


@pytest.mark.slow
def test_command_writes_the_documented_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
        # Both are rounded to six digits.
        assert float(row["teraflops"]) == pytest.approx(work / float(row["median_us"]) / 1e6, rel=1e-4)
        assert float(row["fastest_us"]) <= float(row["median_us"]) and row["torch"] == torch.__version__
        assert row["largest_words"] == row["gpu"] == ""


def test_a_wrong_implementation_is_not_timed() -> None:
    options = ContrastiveOptions(device="cpu", words=[40], hidden=[16], compiled=False, repeats=1)
    benchmark = ContrastiveBenchmark(options)
    benchmark._losses["eager"] = lambda *call, temperature: contrastive_loss(*call, temperature=1.01 * temperature)
    with user_error("eager: ", "loss", "chunked", kind=RuntimeError):
        next(benchmark.cases())


def test_error_names_loss_or_gradient() -> None:
    expected = (torch.ones(2), torch.ones(2, 3, 4))

    def changed(index: int, by: float) -> tuple[Tensor, Tensor]:
        loss, gradient = (each.clone() for each in expected)
        (loss, gradient)[index].view(-1)[0] += by
        return loss, gradient

    check_close("kernel", changed(1, 1e-5), expected)
    for index, label in ((0, "loss"), (1, "gradient")):
        for by in (1e-2, float("nan")):
            with user_error("kernel: ", f"the {label} is", kind=RuntimeError):
                check_close("kernel", changed(index, by), expected)


def test_an_implementation_out_of_memory_has_no_measurement() -> None:
    options = ContrastiveOptions(device="cpu", words=[40], hidden=[16], compiled=False, repeats=1)
    benchmark = ContrastiveBenchmark(options)

    def full(*call: object, temperature: float) -> Tensor:
        raise torch.OutOfMemoryError("full")

    benchmark._losses["eager"] = full
    (measured,) = benchmark.cases()
    eager, chunked = measured
    assert eager.median_us is eager.peak_bytes is None and eager.repeats == 0
    assert chunked.median_us is not None and chunked.times_eager is None


def test_speed_ups() -> None:
    common = {"device": "cpu", "words": 2, "hidden": 2, "layers": 1, "dtype": "float32", "threads": 1}
    medians = {"eager": 6.0, "compiled": 3.0, "chunked": 2.0}
    measured = compare(
        [ContrastiveMeasurement(implementation=name, median_us=us, **common) for name, us in medians.items()]
    )
    assert [(each.times_eager, each.times_compiled) for each in measured] == [(1.0, 0.5), (2.0, 1.0), (3.0, 1.5)]


def test_peak_memory_of_a_call() -> None:
    size = 64 << 20
    peak = memory.peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), torch.device("cpu"))
    if peak is not None:
        # Python's own objects take far less than a tenth; the kernel updates its count of pages in batches.
        assert 0.9 * size <= peak < 1.1 * size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--words", "600", "--hidden", "96", "--dtype", "both", "--repeats", "2"]
    assert main(["benchmark", "contrastive", *arguments]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
    assert lines.count("kernel") == lines.count("eager") == lines.count("compiled") == 2


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--words", "1"], ("--words is 1,", "2 to 2097152")),
        (["--hidden", "0"], ("--hidden is 0", "1 to 65536")),
        (["--layers", "0"], ("--layers is 0", "at least 1")),
        (["--threads", "0"], ("--threads is 0", "at least 1")),
        (["--seed", "-1"], ("--seed is -1", "0 to 2^63-1")),
        (["--repeats", "0"], ("--repeats is 0", "at least 1")),
        (["--largest"], ("--largest requires a GPU",)),
        (["--output", "no/directory/x.csv"], ("--output no/directory/x.csv", "no/directory is not an existing")),
        (["--dtype", "float16"], ("--dtype is float16", "one of float32, bfloat16, both")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_invalid_options(arguments: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["benchmark", "contrastive", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_refused(status, captured.err, *facts)
