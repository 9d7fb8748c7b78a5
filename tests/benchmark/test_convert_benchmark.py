"""`benchmark convert`: both directions in their own processes, compared with `cp`, in bounded memory."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.messages import assert_refused, user_error

from megatron_prealign.benchmark import convert as module
from megatron_prealign.benchmark.options import ConvertOptions
from megatron_prealign.cli import main

# Memory that the allocator caches and the interpreter needs meanwhile; the complete model is 63 MB.
SLACK_BYTES = 16 << 20


@pytest.mark.slow
def test_every_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.csv"
    arguments = ["--parameters", "30000000", "--repeats", "1", "--shard-bytes", "4000000", "--directory", str(tmp_path)]
    assert main(["benchmark", "convert", *arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(output.open()))
    assert [(row["operation"], row["source"]) for row in rows] == [
        ("cp", "checkpoint"),
        ("to-hf", "checkpoint"),
        ("cp", "model"),
        ("from-hf", "model"),
    ]
    for row in rows:
        assert row["operation"] in printed and row["cpu"] and row["torch"]
        assert int(row["bytes"]) == 2 * int(row["parameters"]) > 55_000_000
        assert float(row["gb_per_second"]) == pytest.approx(
            int(row["bytes"]) / float(row["seconds"]) / 1e9,
            rel=1e-4,  # The file has six digits.
        )
    copies, conversions = rows[::2], rows[1::2]
    assert [row["memory_bytes"] for row in copies] == ["", ""]
    for copy, row in zip(copies, conversions, strict=True):
        relative_speed = float(copy["seconds"]) / float(row["seconds"])
        assert float(row["share_of_cp"]) == pytest.approx(relative_speed, rel=1e-4)
        assert 0 < int(row["memory_bytes"]) < int(row["bound_bytes"]) + SLACK_BYTES < int(row["bytes"]) // 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


@pytest.mark.parametrize(
    ("parameters", "layers", "hidden"), [(8_000_000_000, 32, 4096), (70_000_000_000, 316, 4096), (1_000_000, 3, 128)]
)
def test_shapes_are_those_of_published_models(parameters: int, layers: int, hidden: int) -> None:
    benchmark = module.ConvertBenchmark(ConvertOptions(parameters=parameters))
    assert (benchmark.model.num_layers, benchmark.model.hidden_size) == (layers, hidden)
    assert benchmark.parameters == pytest.approx(parameters, rel=0.1)  # whole layers


def test_too_little_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with user_error(tmp_path, "1,000,000 bytes free", "--directory"):
        next(module.ConvertBenchmark(ConvertOptions(directory=str(tmp_path))).measure())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--parameters", "7"], ("--parameters is 7", "1000000 to 1000000000000")),
        (["--repeats", "0"], ("--repeats is 0", "at least 1")),
        (["--shard-bytes", "5"], ("--shard-bytes is 5", "at least 1000000")),
        (["--directory", "/no/such/directory"], ("--directory is /no/such/directory", "existing directory")),
    ],
)
def test_invalid_options(arguments: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["benchmark", "convert", *arguments])
    assert_refused(status, capsys.readouterr().err, *facts)
