"""`benchmark preprocess`: every implementation runs in its own process and writes the same tokens."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.messages import assert_refused

from megatron_prealign.benchmark import preprocess as module
from megatron_prealign.benchmark.options import PreprocessOptions
from megatron_prealign.benchmark.preprocess import PreprocessMeasurement
from megatron_prealign.cli import main


def run(*arguments: str) -> int:
    return main(["benchmark", "preprocess", "--workers", "1", *arguments])


@pytest.mark.slow
def test_synthetic_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.csv"
    assert run("--mb", "0.4", "--megatron-mb", "0.1", "--directory", str(tmp_path), "--output", str(output)) == 0
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(output.open()))
    assert [(row["implementation"], row["encoded_by"]) for row in rows] == [
        ("gigatoken", "gigatoken"),
        ("plain", "tokenizers"),
        ("megatron", "Megatron-Core"),
    ]
    for row in rows:
        assert row["implementation"] in printed
        assert float(row["mb_per_second"]) == pytest.approx(
            int(row["text_bytes"]) / float(row["seconds"]) / 1e6,
            rel=1e-4,  # The file has six digits.
        )
        # An interpreter alone takes more than 10 MB.
        assert int(row["peak_bytes"]) > 10 << 20
        assert row["cpu"] and row["commit"] and row["torch"]
        assert row["corpus"] == "synthetic, documents of 200 to 2,000 bytes"
        assert row["tokenizer"] == "byte-level BPE, 4,096 ids"
    assert rows[0]["text_bytes"] == rows[1]["text_bytes"] and rows[0]["tokens"] == rows[1]["tokens"]
    assert 350_000 < int(rows[0]["text_bytes"]) < 400_000
    assert 100_000 <= int(rows[2]["text_bytes"]) < 110_000
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_custom_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"body": f"line {number} of a text of many words"}) for number in range(3000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    arguments = ["--input", str(tmp_path / "a.jsonl"), "--text-key", "body", "--implementation", "plain"]
    assert run("--directory", str(tmp_path), *arguments) == 2
    assert "the text yields only" in capsys.readouterr().err
    assert main(["train-tokenizer", "--input", str(tmp_path / "a.jsonl"), "--text-key", "body", "--vocab-size", "280",
                 "--output", str(tmp_path / "tok")]) == 0  # fmt: skip
    assert run("--directory", str(tmp_path), *arguments, "--tokenizer", str(tmp_path / "tok")) == 0
    assert "3,000" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "tok"]


@pytest.mark.slow
def test_different_tokens_are_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checksums = iter("ab")
    monkeypatch.setattr(module, "file_checksum", lambda path: next(checksums))
    arguments = ["--implementation", "gigatoken", "plain", "--mb", "0.3"]
    assert run("--directory", str(tmp_path), *arguments) == 2
    assert "plain wrote different tokens" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_different_tokens_of_megatron_are_a_user_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_tokens(case: Any) -> Any:
        """Measures another implementation, in this process; `test_synthetic_text` runs Megatron-Core's."""
        measured = module._measure_preprocess(replace(case, implementation="plain"))
        Path(f"{case.prefix}.bin").write_bytes(b"other")
        return PreprocessMeasurement("megatron", peak_bytes=0, workers=1, **measured)

    monkeypatch.setattr(module, "_run_in_subprocess", other_tokens)
    arguments = ["--implementation", "megatron", "--mb", "0.3", "--megatron-mb", "0.05"]
    assert run("--directory", str(tmp_path), *arguments) == 2
    assert "megatron wrote different tokens" in capsys.readouterr().err


def test_too_little_disk_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda directory: SimpleNamespace(free=1000))
    status = run("--directory", str(tmp_path), "--mb", "0.3")
    assert_refused(status, capsys.readouterr().err.splitlines()[-1], tmp_path, "1,000 bytes free", "--directory")


def test_new_words_are_new() -> None:
    document = module._document(b"a " * 1000, 4000, np.random.default_rng(0))
    new = [word for word in document.split() if len(word) == 8]
    assert len(new) > 15 and len(set(new)) == len(new)


@pytest.mark.slow
def test_a_dead_process_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_run", exit)
    assert run("--directory", str(tmp_path), "--mb", "0.3") == 2
    assert "gigatoken: the measuring process died" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--implementation", "fast"], ("--implementation is fast", "one or more of gigatoken, plain, megatron")),
        (["--implementation", "plain", "plain"], ("--implementation is plain plain",)),
        (["--workers", "0"], ("--workers is 0",)),
        (["--mb", "0"], ("--mb is 0",)),
        (["--document-bytes", "10"], ("--document-bytes is 10,", "two numbers")),
        (["--document-bytes", "20", "10"], ("--document-bytes is 20 10",)),
        (["--directory", "/nowhere"], ("--directory is /nowhere", "existing directory")),
        (["--input", "missing.jsonl"], ("missing.jsonl: file not found",)),
    ],
)
def test_invalid_options(arguments: list[str], facts: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status = run(*arguments)
    assert_refused(status, capsys.readouterr().err, *facts)


def test_documents_have_the_requested_lengths(tmp_path: Path) -> None:
    path = module._write_corpus(tmp_path, PreprocessOptions(mb=0.5, document_bytes=[10, 20_000], seed=3))
    lengths = [len(json.loads(line)["text"]) for line in path.read_text().splitlines()]
    assert 500_000 < path.stat().st_size < 530_000
    assert min(lengths) < 20 and 10_000 < max(lengths) <= 20_000
