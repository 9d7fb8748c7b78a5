"""The data and the study of 148 M parameters, from a text file."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prealign.study.definition import load_study
from megatron_prealign.study.matrix import build_jobs

REPOSITORY = Path(__file__).parents[2]
TEXT = REPOSITORY / "tests" / "data" / "languages" / "en.txt"
PREPARE = Path("examples", "english_clone_150m", "prepare.py")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PREPARE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_study_from_a_text_file(directory: Path) -> None:
    arguments = (TEXT, "--vocab-size", 400, "--words", 200, "--workers", 1)
    done = prepare(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    words = Path("runs/english_clone_150m/data/words.tsv").read_text().splitlines()
    assert len(words) == 200
    assert all(line.split("\t")[0] == line.split("\t")[1] for line in words)
    # Every run but the controls trains with the true pairs.
    jobs = build_jobs(load_study("examples/english_clone_150m/study.yaml"))
    assert {job.run for job in jobs if "shuffled" in job.recipe.dictionary.table} == {
        "alignment_shuffled",
        "prealign_shuffled",
    }
    assert len(jobs) == 21
    again = prepare(*arguments)
    assert "$ " not in again.stdout, again.stdout


def test_errors_are_one_line(directory: Path) -> None:
    missing = prepare("missing.jsonl")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: missing.jsonl")
    assert missing.stderr.count("\n") == 1
    assert "--vocab-size must be at least 1, got 0" in prepare(TEXT, "--vocab-size", 0).stderr
