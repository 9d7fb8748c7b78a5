"""The cache directory: complete or missing, built once, never used when corrupt."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from support.messages import user_error

from megatron_prealign.data import index_cache
from megatron_prealign.data.index_cache import IncompleteCacheError, build_if_needed, load_arrays, wait_for_arrays

ARRAYS = {"first": np.arange(50, dtype=np.int16), "second": np.arange(12, dtype=np.int64).reshape(6, 2)}


class Builds:
    """A build function that counts its calls."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.count = 0
        self.seconds = seconds

    def __call__(self) -> Iterator[tuple[str, np.ndarray]]:
        self.count += 1
        for name, array in ARRAYS.items():
            time.sleep(self.seconds)
            yield name, array


def load(
    directory: Path,
    build: Callable[[], Iterator[tuple[str, np.ndarray]]],
    is_builder: bool = True,
    timeout_seconds: float = 0.0,
) -> dict[str, np.ndarray]:
    if is_builder:
        build_if_needed(directory, build)
    return wait_for_arrays(directory, timeout_seconds)


def assert_expected(arrays: dict[str, np.ndarray]) -> None:
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


def test_second_call_loads(tmp_path):
    builds = Builds()
    assert_expected(load(tmp_path / "deep" / "cache", builds))
    assert_expected(load(tmp_path / "deep" / "cache", builds))
    assert builds.count == 1
    assert visible(tmp_path / "deep") == ["cache"]


def truncate(directory: Path) -> None:
    os.truncate(directory / "second.npy", (directory / "second.npy").stat().st_size - 8)


def grow(directory: Path) -> None:
    with open(directory / "second.npy", "ab") as file:
        file.write(b"\0" * 8)


def other_shape(directory: Path) -> None:
    np.save(directory / "second.npy", np.arange(12, dtype=np.int64).reshape(2, 6))


def half_manifest(directory: Path) -> None:
    os.truncate(directory / "index.json", 20)


def other_version(directory: Path) -> None:
    manifest = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(manifest | {"format_version": 99}))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        grow,
        other_shape,
        half_manifest,
        other_version,
        lambda directory: (directory / "first.npy").unlink(),
        lambda directory: (directory / "index.json").unlink(),
        lambda directory: (directory / "index.json").write_text("[]"),
    ],
)
def test_corrupt_directory_is_rebuilt_by_a_builder_and_rejected_by_others(tmp_path, damage):
    directory = tmp_path / "cache"
    load(directory, Builds())
    damage(directory)
    with pytest.raises(IncompleteCacheError):
        load_arrays(directory)
    with user_error(directory, "no complete sample index cache", "data.cache"):
        load(directory, Builds(), is_builder=False)
    builds = Builds()
    assert_expected(load(directory, builds))
    assert builds.count == 1
    assert visible(tmp_path) == ["cache"]


def test_killed_builder_leaves_no_complete_cache(tmp_path):
    directory = tmp_path / "cache"
    script = (
        "import sys, time, numpy as np\n"
        "from pathlib import Path\n"
        "from megatron_prealign.data.index_cache import build_if_needed\n"
        "def build():\n"
        "    yield 'first', np.arange(50, dtype=np.int16)\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
        "build_if_needed(Path(sys.argv[1]), build)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    finally:
        process.kill()
        process.stdout.close()
    assert not directory.exists()
    assert len(visible(tmp_path)) == 1
    # Its lock was released with the process: the next builder does not wait and removes the leftover.
    assert_expected(load(directory, Builds()))
    assert visible(tmp_path) == ["cache"]


def build_in_threads(directory: Path, count: int) -> list[Builds]:
    """Concurrent builders: file locks also exclude threads, since each opens the lock file separately."""
    builds = [Builds(seconds=0.1) for _ in range(count)]
    results: list[dict[str, np.ndarray]] = []
    threads = [threading.Thread(target=lambda b=b: results.append(load(directory, b))) for b in builds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(results) == count
    for arrays in results:
        assert_expected(arrays)
    return builds


def test_builders_on_one_disk_build_once(tmp_path):
    assert sum(builds.count for builds in build_in_threads(tmp_path / "cache", 3)) == 1


def test_builders_without_locks_all_succeed(tmp_path, monkeypatch):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert sum(builds.count for builds in build_in_threads(tmp_path / "cache", 3)) >= 1
    assert visible(tmp_path) == ["cache"]


def test_others_wait_for_a_late_directory(tmp_path):
    thread = threading.Timer(0.3, lambda: load(tmp_path / "cache", Builds()))
    thread.start()
    builds = Builds()
    assert_expected(load(tmp_path / "cache", builds, is_builder=False, timeout_seconds=20.0))
    thread.join(timeout=30)
    assert builds.count == 0


def test_failing_builder_leaves_nothing(tmp_path):
    def build() -> Iterator[tuple[str, np.ndarray]]:
        yield "first", ARRAYS["first"]
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        load(tmp_path / "cache", build)
    assert visible(tmp_path) == []


def test_unwritable_directory_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with user_error(f"cannot write sample index cache {tmp_path / 'file' / 'cache'}", "data.cache"):
        load(tmp_path / "file" / "cache", Builds())


def test_directory_can_be_read_by_the_group(tmp_path):
    # mkdtemp creates private directories, but on a shared disk other users may resume the run.
    load(tmp_path / "cache", Builds())
    mask = index_cache._umask()
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o777 & ~mask
