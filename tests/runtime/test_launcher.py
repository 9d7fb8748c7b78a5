"""Processes that torchrun started end with it; others outlive their parents."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_prealign.runtime.launcher import STUDY_VARIABLE

# The launcher starts a rank that watches it and waits; the rank saves first if it handles SIGTERM.
RANK = """
import pathlib, signal, sys, time
from megatron_prealign.runtime.launcher import watch_launcher
if sys.argv[2] == "saves":
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1], "saved").touch(), sys.exit(0)))
watch_launcher(interval_s=0.05)
watch_launcher(interval_s=0.05)
pathlib.Path(sys.argv[1], "watching").touch()
time.sleep(60)
"""
# Its launcher dies while it imports torch.
SLOW_RANK = """
import os, pathlib, sys, time
import megatron_prealign
from megatron_prealign.runtime.launcher import watch_launcher
pathlib.Path(sys.argv[1], "watching").touch()
while os.getppid() == megatron_prealign.STARTED[1]:
    time.sleep(0.01)
watch_launcher(interval_s=0.05)
time.sleep(60)
"""
# Another rank notices the launcher's death first.
ASKED_RANK = """
import pathlib, sys, time
from megatron_prealign.runtime import launcher
launcher.watch_launcher(interval_s=60)
launcher.report_end()
pathlib.Path(sys.argv[1], "watching").touch()
while not launcher.launcher_has_ended():
    time.sleep(0.01)
launcher.report_end()
launcher.report_end()
"""
# It imported the package before it started a rank by fork.
FORKING_LAUNCHER = """
import os, time
from megatron_prealign.runtime.launcher import launcher_has_ended, watch_launcher
if os.fork() == 0:
    watch_launcher(interval_s=0.01)
    time.sleep(0.2)
    os._exit(int(launcher_has_ended()))
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, *sys.argv[1:]]).wait()"
STUDY = f"import os; os.environ[{STUDY_VARIABLE!r}] = str(os.getpid()); {LAUNCHER}"
# What a run of a study starts is not watched, although it inherits the environment.
HELPING_RUN = """
import subprocess, sys
from megatron_prealign.runtime.launcher import watch_launcher
watch_launcher(interval_s=0.05)
raise SystemExit(subprocess.run([sys.executable, "-c", sys.argv[1]]).returncode)
"""
HELPER = """
import time
from megatron_prealign.runtime import launcher
launcher.watch_launcher(interval_s=0.01)
time.sleep(0.2)
raise SystemExit(launcher._launcher is not None)
"""


def killed_launcher(
    directory: Path, script: str, kind: str = "ends", *, launched_by: str = LAUNCHER, **environment: str
) -> tuple[psutil.Process, int]:
    """Kills the launcher of a rank that watches it; returns the rank and the id of the launcher."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHELASTIC")}
    with (directory / "log").open("w") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-c", launched_by, "-c", script, str(directory), kind],
            env=inherited | environment,
            stdout=log,
            stderr=log,
        )
    while not (directory / "watching").exists():
        assert launcher.poll() is None, (directory / "log").read_text()
        time.sleep(0.01)
    (rank,) = psutil.Process(launcher.pid).children()
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    return rank, launcher.pid


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["ends", "saves"])
def test_a_rank_ends_with_its_launcher_and_may_save_first(tmp_path: Path, kind: str) -> None:
    rank, launcher = killed_launcher(tmp_path, RANK, kind, TORCHELASTIC_RUN_ID="1", LOCAL_RANK="0")
    rank.wait(timeout=20)
    assert (tmp_path / "saved").exists() == (kind == "saves")
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "torchrun" in line and str(launcher) in line


@pytest.mark.slow
@pytest.mark.timeout(30)
def test_one_rank_of_a_host_reports_it(tmp_path: Path) -> None:
    rank, _ = killed_launcher(tmp_path, RANK, TORCHELASTIC_RUN_ID="1", LOCAL_RANK="1")
    rank.wait(timeout=20)
    assert (tmp_path / "log").read_text() == ""


@pytest.mark.timeout(30)
@pytest.mark.parametrize("script", [SLOW_RANK, ASKED_RANK], ids=["died before it was watched", "asked by another rank"])
def test_an_end_that_the_watch_does_not_see_first_is_reported_once(tmp_path: Path, script: str) -> None:
    rank, launcher = killed_launcher(tmp_path, script, TORCHELASTIC_RUN_ID="1", LOCAL_RANK="0")
    rank.wait(timeout=20)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "torchrun" in line and str(launcher) in line


@pytest.mark.timeout(30)
@pytest.mark.parametrize("script", [RANK, SLOW_RANK], ids=["watched", "died early"])
def test_a_run_ends_with_its_study(tmp_path: Path, script: str) -> None:
    run, study = killed_launcher(tmp_path, script, "saves", launched_by=STUDY)
    run.wait(timeout=20)
    assert (tmp_path / "saved").exists() == (script is RANK)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "study" in line and str(study) in line


@pytest.mark.timeout(30)
def test_processes_of_a_run_do_not_watch_the_study() -> None:
    environment = os.environ | {STUDY_VARIABLE: str(os.getpid())}
    assert subprocess.run([sys.executable, "-c", HELPING_RUN, HELPER], env=environment).returncode == 0


@pytest.mark.timeout(30)
def test_a_forked_rank_has_the_parent_that_forked_it() -> None:
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "1"}
    assert subprocess.run([sys.executable, "-c", FORKING_LAUNCHER], env=environment).returncode == 0


@pytest.mark.timeout(30)
def test_a_process_without_torchrun_outlives_its_parent(tmp_path: Path) -> None:
    rank, _ = killed_launcher(tmp_path, RANK)
    with pytest.raises(psutil.TimeoutExpired):
        rank.wait(timeout=0.4)
    rank.kill()
