"""Preprocessing in real processes that are killed, interrupted or lose a worker."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from support.marks import slow_except
from support.messages import assert_facts, user_error
from support.preprocess_runs import SETTINGS, files, make_inputs, run

from megatron_prealign.cli import main
from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess

SCRIPT = """
import sys
from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess

if __name__ == "__main__":
    settings = PreprocessSettings(
        language="zh", segmenter=sys.argv[4], workers=2, limits=Limits(block_bytes=2500), save_every_bytes=3000
    )
    preprocess([sys.argv[1]], sys.argv[2], sys.argv[3], settings, show_progress=False)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("resume"))


@pytest.mark.slow
def test_killed_with_workers(directory: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.jsonl"
    lines = (directory / "a.jsonl").read_text(encoding="utf-8").splitlines()
    big.write_text("\n".join(line for line in lines * 30 if line != "no JSON"), encoding="utf-8")
    (tmp_path / "script.py").write_text(SCRIPT)
    out = tmp_path / "x"
    command = [
        sys.executable,
        str(tmp_path / "script.py"),
        str(big),
        str(directory / "tok"),
        str(out),
        "support.word_cutters:Slow",
    ]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    journal = tmp_path / "x.unfinished/journal.json"
    deadline = time.monotonic() + 120
    while not journal.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = _children(process.pid)
    process.kill()
    process.wait()
    assert children and not (tmp_path / "x.bin").exists()
    # Workers exit after their parent.
    while any(_is_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    settings = PreprocessSettings(
        language="zh", segmenter="support.word_cutters:Slow", limits=Limits(block_bytes=2500), save_every_bytes=1 << 30
    )
    with user_error(f"{out}.unfinished: ", "unfinished run", "--resume"):
        preprocess([big], directory / "tok", out, settings, show_progress=False)
    preprocess([big], directory / "tok", out, replace(settings, resume=True), show_progress=False)
    preprocess([big], directory / "tok", tmp_path / "y", settings, show_progress=False)
    assert files(out) == files(tmp_path / "y")


@pytest.mark.parametrize(
    ("name", "workers"),
    slow_except([("SIGTERM", "1"), ("SIGTERM", "2"), ("SIGHUP", "1"), ("SIGINT", "2")], ("SIGTERM", "1")),
)
def test_a_signal_reports_what_is_saved(directory: Path, tmp_path: Path, name: str, workers: str) -> None:
    path = tmp_path / "big.jsonl"
    path.write_text('{"text": "我们"}\n' * 2_000, encoding="utf-8")
    arguments = ["--input", path, "--tokenizer", directory / "tok", "--language", "zh", "--output", tmp_path / "x"]
    arguments += ["--segmenter", "support.word_cutters:Slow", "--workers", workers]
    command = [sys.executable, "-m", "megatron_prealign", "preprocess", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "x.unfinished/lock").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert_facts(errors, "interrupted; nothing was saved")
    assert "Traceback" not in errors
    assert [each.name for each in tmp_path.iterdir()] == ["big.jsonl"]


def _children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_dead_worker_ends_the_run(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' * 50 + '{"text": "die now"}\n' + '{"text": "two"}\n' * 50)
    arguments = ["--tokenizer", str(directory / "tok"), "--language", "zh", "--workers", "2"]
    arguments += ["--segmenter", "support.word_cutters:Deadly", "--output", str(tmp_path / "x")]
    assert main(["preprocess", "--input", str(path), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert_facts(errors[0], "worker process died", "--workers than 2", "--max-document-mb")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.jsonl"]


def test_ctrl_c_does_not_reach_a_worker_that_starts(directory: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, workers=2, segmenter="support.word_cutters:Undisturbed")
    run(directory, tmp_path / "x", settings)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
