"""Processes of a study: what is said of their ends, and how they are stopped. A shell script stands for `pretrain`."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts

from megatron_prealign import resources
from megatron_prealign.files.lock import LOCK, file_lock
from megatron_prealign.study import execution
from megatron_prealign.study.execution import _Running, progress, train_all
from megatron_prealign.study.matrix import Job

SCRIPT = """#!/bin/sh
case "${5##*/}" in
  *crashes*) echo "Traceback"; echo "boom"; exit 1;;
  *refuses*) echo "error: new"; echo "more"; exit 2;;
  *dies*) kill -9 $$;;
  *endless*) trap 'echo saved; exit 0' TERM; touch "$5.started"; while :; do sleep 0.02; done;;
  *early*) ;;
  *gpu*) echo "$CUDA_VISIBLE_DEVICES" > "$5.gpu"; all=${5##*of}; all=${all%.yaml}
    while [ "$(ls "${5%/*}" | grep -c 'gpu$')" -lt "$all" ]; do sleep 0.02; done; touch "$5.done";;
  *deaf*) trap '' TERM; touch "$5.started"; while :; do sleep 0.02; done;;
  *) touch "$5.done";;
esac
"""


@pytest.fixture(autouse=True)
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "script"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(execution, "is_complete", lambda job: Path(f"{job.recipe_file}.done").exists())


def job_of(name: str, directory: Path) -> Job:
    recipe: Any = None
    return Job(name, 1, recipe, directory / f"{name}.yaml", directory / "runs" / f"{name}_seed1")


def wait_for(path: Path) -> None:
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} did not appear")


def test_each_end_is_said_and_ends_no_other_run(tmp_path: Path) -> None:
    jobs = [job_of(name, tmp_path) for name in ("unwritable", "early", "dies", "crashes", "refuses", "good")]
    jobs[0].directory.with_suffix(".log").mkdir(parents=True)
    # Of an earlier attempt.
    jobs[3].directory.with_suffix(".log").write_text("error: old\n")
    lines: list[str] = []
    incomplete = train_all([*jobs], 2, lines.append)
    assert incomplete == jobs[:-1]
    ends = {job.run: [line for line in lines if line.startswith(f"{job.name}: ")][-1] for job in jobs}
    assert_facts(ends["unwritable"], "failed", jobs[0].directory.with_suffix(".log"))
    assert_facts(ends["early"], "stopped before its last step")
    assert_facts(ends["dies"], "failed with SIGKILL")
    assert_facts(ends["crashes"], "failed with status 1", "boom")
    assert_facts(ends["refuses"], "failed with status 2", "error: new")
    assert_facts(ends["good"], "trained in")


@pytest.mark.parametrize(("name", "killed"), [("endless", False), ("deaf", True)])
def test_stop_lets_runs_save_and_starts_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, killed: bool
) -> None:
    if killed:
        monkeypatch.setattr(execution, "_STOP_S", 0.2)
    lines: list[str] = []
    running, job = _Running(lines.append), job_of(name, tmp_path)
    outcome: list[bool] = []
    thread = threading.Thread(target=lambda: outcome.append(running.train(job)))
    thread.start()
    wait_for(tmp_path / f"{name}.yaml.started")
    running.stop()
    thread.join()
    assert outcome == [False]
    ((_, process),) = running._processes
    assert process.returncode == (-9 if killed else 0)
    assert bool([line for line in lines if line.startswith(f"{job.name}: killed")]) == killed
    assert ("saved" in job.directory.with_suffix(".log").read_text()) == (not killed)

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", fail)
    assert not running.train(job_of("good", tmp_path))


@pytest.mark.parametrize(("count", "expected"), [(2, ["4", "7"]), (3, ["4", "4", "7"])])
def test_runs_at_once_have_different_gpus(tmp_path: Path, count: int, expected: list[str]) -> None:
    """Each run waits until all have started. More runs than GPUs share them."""
    jobs = [job_of(f"gpu{number}of{count}", tmp_path) for number in range(count)]
    assert train_all(jobs, count, lambda line: None, gpus=["4", "7"]) == []
    assert sorted(Path(f"{job.recipe_file}.gpu").read_text().strip() for job in jobs) == expected


def test_a_run_that_still_saves_is_waited_for(tmp_path: Path) -> None:
    """Two processes must not train the same run."""
    job = job_of("good", tmp_path)
    job.directory.mkdir(parents=True)
    lines: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with file_lock(job.directory / LOCK, wait=False):
            trained = pool.submit(train_all, [job], 1, lines.append)
            while not lines:
                time.sleep(0.01)
            assert not trained.done()
            assert not Path(f"{job.recipe_file}.done").exists()
        assert trained.result() == []
    assert_facts(lines[0], f"{job.name}: waiting for {job.directory}", f"process {os.getpid()}")


def test_a_run_that_never_releases_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started nevertheless, and says itself which process it is."""
    monkeypatch.setattr(execution, "_STOP_S", 0.0)
    job = job_of("good", tmp_path)
    job.directory.mkdir(parents=True)
    with file_lock(job.directory / LOCK, wait=False):
        assert train_all([job], 1, lambda line: None) == []


def test_one_run_per_gpu_by_default(tmp_path: Path) -> None:
    jobs = [job_of(f"gpu{number}of2", tmp_path) for number in range(4)]
    assert train_all(jobs, None, lambda line: None, gpus=["4", "7"]) == []
    assert {Path(f"{job.recipe_file}.gpu").read_text().strip() for job in jobs} == {"4", "7"}


def test_gpus_are_found_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = tmp_path / "gpus"
    monkeypatch.setattr(resources, "_NVIDIA", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert resources.visible_gpus() == []
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (driver / name).mkdir(parents=True)
    assert resources.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-abc")
    assert resources.visible_gpus() == ["3", "GPU-abc"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert resources.visible_gpus() == []


def test_progress_is_that_of_the_last_step_that_can_be_read(tmp_path: Path) -> None:
    job = job_of("a", tmp_path)
    assert (progress(job).state, progress(job).step) == ("waiting", 0)
    job.directory.mkdir(parents=True)
    lines = (
        '{"kind": "train", "step": 7, "tokens": 70}',
        '{"kind": "train"}',
        '{"kind": "train", "step": null, "tokens": 8}',
    )
    (job.directory / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tra']), encoding="utf-8")
    found = progress(job)
    assert (found.state, found.step, found.tokens) == ("started", 7, 70)
