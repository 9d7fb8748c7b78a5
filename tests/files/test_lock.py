"""Only one run at a time may write to a directory."""

import errno
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.messages import assert_facts, user_error
from support.model_builds import recipe_values
from support.tiny import recipe_of

from megatron_prealign.files.lock import LOCK, locked_directories
from megatron_prealign.run.directory import lock_run_directory

# Acquires the lock, prints a line, and waits to be killed.
HOLD = """
import sys, time
from pathlib import Path
from megatron_prealign.files.lock import locked_directories
with locked_directories([Path(sys.argv[1])]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_second_run_is_rejected_and_a_killed_one_does_not_block(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with (
            user_error(
                f"{tmp_path} is in use",
                f"process {other.pid} on {socket.gethostname()} since 20",
                " UTC",
                "logging.run_dir",
                "checkpoint.directory",
            ),
            locked_directories([tmp_path]),
        ):
            raise AssertionError("two runs in one directory")
        os.kill(other.pid, signal.SIGKILL)
        other.wait(20)
    # The file still exists, but it is not locked.
    assert (tmp_path / LOCK).exists()
    with locked_directories([tmp_path]):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()


def test_any_locked_directory_rejects_the_run(tmp_path: Path) -> None:
    run, shared = tmp_path / "run", tmp_path / "shared"
    with locked_directories([run, shared]):
        with user_error(f"{shared} is in use"), locked_directories([tmp_path / "b", shared]):
            raise AssertionError("two runs in one directory")
        # Directories created by the rejected run have been removed.
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "shared"]
    assert list(tmp_path.iterdir()) == []


def test_one_directory_by_two_names_is_locked_once(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with locked_directories([tmp_path, tmp_path / "link", tmp_path / "."]):
        assert (tmp_path / LOCK).exists()


def test_non_empty_directories_are_kept(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    with locked_directories([directory]):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]


def test_holder_that_has_not_written_its_name(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with user_error(f"{tmp_path} is in use", "unknown process"), locked_directories([tmp_path]):
            raise AssertionError("two runs in one directory")


def test_lock_file_removed_while_locking_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The previous holder removed it between open and flock."""
    real, path = fcntl.flock, tmp_path / LOCK
    removed: list[int] = []

    def late(file: object, how: int) -> None:
        if not removed:
            path.unlink()
            removed.append(1)
        real(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with locked_directories([tmp_path]):
        monkeypatch.undo()
        with path.open() as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refuse(file: object, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), locked_directories([tmp_path]):
        assert list(tmp_path.iterdir()) == []
    (message,) = caplog.messages
    assert_facts(message, tmp_path, "not support locks", f"[Errno {number}] {os.strerror(number)}")


def test_a_run_can_start_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An incomplete checkpoint may be what fills the disk: it is removed before anything is written."""
    run_dir = tmp_path / "run"
    half = run_dir / "checkpoints" / ".step_00000020.incomplete"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"x" * 1000)
    recipe = recipe_of(recipe_values("llama", logging={"run_dir": str(run_dir), "tensorboard": False}), tmp_path)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if half.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with ExitStack() as stack:
        lock_run_directory(recipe, stack)
        assert not half.exists()
        with user_error(run_dir, "in use"), ExitStack() as second:
            lock_run_directory(recipe, second)


def test_creating_a_directory_on_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(recipe_values("llama", logging={"run_dir": str(tmp_path / "run")}), tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with user_error(tmp_path / "run", "No space left on device", "free disk space"):
        lock_run_directory(recipe, ExitStack())
