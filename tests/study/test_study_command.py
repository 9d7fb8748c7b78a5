"""`megatron-prealign study`, end to end: trains, resumes, tabulates, survives a run that fails."""

import csv
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from support.messages import assert_facts, assert_refused
from support.tiny import Tiny

from megatron_prealign.cli import main
from megatron_prealign.files.lock import file_lock

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def write_study(tiny: Tiny, directory: Path, **changes: Any) -> str:
    base = tiny.values(directory / "unused")
    base["training"].update(train_iters=2, retrieval_words=50, eval_samples=2)
    base["alignment"]["train_iters"] = 2
    base["parallel"] = {"device": "cpu"}
    (directory / "base.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    study = {
        "output": str(directory / "study"),
        "base": [str(directory / "base.yaml")],
        "seeds": [1, 2],
        "runs": [{"name": "joint", "set": {"alignment": None}}, {"name": "aligned"}],
        "quick": {"runs": ["joint", "aligned"]},
        **changes,
    }
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return str(path)


def test_a_failed_run_does_not_end_the_others_and_is_resumed(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_study(tiny, tmp_path)
    # A file where a run directory belongs: this run cannot start.
    obstacle = tmp_path / "study" / "runs" / "aligned_seed2"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("in the way")
    status = main(["study", "--config", config])
    captured = capsys.readouterr()
    assert_refused(status, captured.err, "1 run not complete", "aligned_seed2", "aligned_seed2.log", "study --config")
    assert_facts(captured.out, "aligned_seed2: failed with status 2", "Not in the tables: aligned_seed2: not complete")
    assert_facts(captured.out, "| joint |", "± ", "(1 of 2 seeds)")

    obstacle.unlink()
    assert main(["study", "--config", config, "--status"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(row[0], row[1]) for row in rows[1:5]] == [
        ("joint_seed1", "complete"),
        ("aligned_seed1", "complete"),
        ("joint_seed2", "complete"),
        ("aligned_seed2", "waiting"),
    ]
    assert rows[5][:3] == ["3", "of", "4"]
    assert main(["study", "--config", config, "--tables"]) == 0
    printed = capsys.readouterr().out
    assert_facts(printed, "aligned_seed2: not complete", "results.html", "4 plots from 3 runs")
    assert (tmp_path / "study" / "results.md").read_text(encoding="utf-8") in printed

    assert main(["study", "--config", config]) == 0
    printed = capsys.readouterr().out
    assert_facts(printed, "3 of 4 runs are complete", "aligned_seed2: trained in", "wrote ", "results.csv")
    assert "joint_seed1: $" not in printed
    output = tmp_path / "study"
    assert (output / "results.md").read_text(encoding="utf-8") in printed
    assert (output / "plots" / "loss-over-tokens.png").stat().st_size > 1000
    page = (output / "results.html").read_text(encoding="utf-8")
    assert_facts(page, f"megatron-prealign study --config {config}", output / "recipes" / "joint_seed1.yaml")
    with (output / "results.csv").open(encoding="utf-8", newline="") as file:
        values = {tuple(row[:5]): float(row[5]) for row in list(csv.reader(file))[1:]}
    losses = {key[:2]: value for key, value in values.items() if key[2:4] == ("validation_loss", "en")}
    assert sorted(losses) == [("aligned", "1"), ("aligned", "2"), ("joint", "1"), ("joint", "2")]
    # Untrained models are near the logarithm of the vocabulary, and seeds differ.
    assert len(set(losses.values())) == 4 and all(6.5 < loss < 7.2 for loss in losses.values())
    assert {key[2] for key in values} >= {"tokens", "seconds", "memory_gb", "word_retrieval_p_at_1"}
    parts = [name for name in {key[2] for key in values} if name.startswith("tokens_")]
    for seed in ("1", "2"):
        assert values["aligned", seed, "tokens_alignment_words", "", ""] > 0
        whole = values["aligned", seed, "tokens", "", ""]
        assert sum(values.get(("aligned", seed, name, "", ""), 0) for name in parts) == whole


def test_two_studies_in_one_directory(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_study(tiny, tmp_path)
    (tmp_path / "study").mkdir()
    with file_lock(tmp_path / "study" / ".study.lock", wait=False):
        status = main(["study", "--config", config])
    assert_refused(status, capsys.readouterr().err, tmp_path / "study", "in use by another study", "process")
    assert not list((tmp_path / "study").iterdir())


def test_an_interrupted_study_lets_its_runs_save(tiny: Tiny, tmp_path: Path) -> None:
    runs = [{"name": "joint", "set": {"alignment": None, "training.train_iters": 100_000}}]
    config = write_study(tiny, tmp_path, runs=runs, quick={}, processes=1)
    command = [sys.executable, "-m", "megatron_prealign", "study", "--config", config]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as study:
        metrics = tmp_path / "study" / "runs" / "joint_seed1" / "metrics.jsonl"
        while not (metrics.exists() and '"train"' in metrics.read_text(encoding="utf-8")):
            assert study.poll() is None
            time.sleep(0.05)
        study.send_signal(signal.SIGINT)
        # Once it stops its runs, nothing hurries it.
        assert study.stdout is not None
        assert any("stopping 1 run" in line for line in study.stdout)
        study.send_signal(signal.SIGINT)
        _, errors = study.communicate()
    assert study.returncode == 130
    assert_facts(errors, "interrupted", "study --config")
    assert list((metrics.parent / "checkpoints").glob("step_*"))
    assert not (tmp_path / "study" / "runs" / "joint_seed2").exists()
    assert not (tmp_path / "study" / ".study.lock").exists()


def test_the_runs_of_a_killed_study_save_and_end(tiny: Tiny, tmp_path: Path) -> None:
    runs = [{"name": "joint", "set": {"alignment": None, "training.train_iters": 100_000}}]
    config = write_study(tiny, tmp_path, runs=runs, quick={}, processes=1)
    with subprocess.Popen([sys.executable, "-m", "megatron_prealign", "study", "--config", config]) as study:
        directory = tmp_path / "study" / "runs" / "joint_seed1"
        metrics = directory / "metrics.jsonl"
        while not (metrics.exists() and '"train"' in metrics.read_text(encoding="utf-8")):
            assert study.poll() is None
            time.sleep(0.05)
        (run,) = psutil.Process(study.pid).children()
        study.kill()
    run.wait(timeout=120)
    assert list((directory / "checkpoints").glob("step_*"))
    assert not (directory / ".run.lock").exists()
    assert f"the study (process {study.pid}) has ended" in directory.with_suffix(".log").read_text(encoding="utf-8")
