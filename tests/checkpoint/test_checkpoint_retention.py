"""Which checkpoints stay: the newest of the branch that is being written, whatever else lies beside them."""

import logging
import shutil
from pathlib import Path

import pytest

from megatron_prealign.checkpoint.retention import prune, remove_unfinished, step_name


def write(directory: Path, *steps: int) -> None:
    for step in steps:
        folder = directory / step_name(step)
        folder.mkdir()
        (folder / "state.json").write_text("{}")


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step_*"))


@pytest.mark.parametrize(
    ("there", "newest", "keep", "left"),
    [
        ([1, 2, 3], 3, 1, [3]),
        ([1, 2, 3], 3, 2, [2, 3]),
        ([1, 2, 3], 3, 5, [1, 2, 3]),
        # Rolled back to 2, then 3 was written: 8 and 9 are of the branch that was left.
        ([2, 3, 8, 9], 3, 2, [2, 3]),
        ([2, 3, 9], 3, 1, [3]),
        ([1, 2, 3, 8, 9], 3, 4, [1, 2, 3, 9]),
    ],
)
def test_abandoned_steps_go_first_then_the_oldest(
    tmp_path: Path, there: list[int], newest: int, keep: int, left: list[int]
) -> None:
    write(tmp_path, *there)
    prune(tmp_path, tmp_path / step_name(newest), keep)
    assert steps(tmp_path) == left


def test_more_steps_than_eight_digits_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999, 100_000_000, 100_000_001)
    prune(tmp_path, tmp_path / step_name(100_000_001), 2)
    assert steps(tmp_path) == [100_000_000, 100_000_001]


def test_folders_of_the_user_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    shutil.copytree(tmp_path / step_name(1), tmp_path / "step_00000001_best")
    prune(tmp_path, tmp_path / step_name(2), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001_best", "step_00000002"]


def test_unfinished_folders_of_any_step_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 4)
    for name in (".step_00000003.incomplete", ".step_00000099.incomplete", ".step_00000004.abandoned.incomplete"):
        shutil.copytree(tmp_path / step_name(4), tmp_path / name)
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000004"]


def test_a_folder_that_cannot_be_removed_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, 2, 3)
    real = shutil.rmtree

    def busy(path: Path) -> None:
        if path.name == step_name(1):
            raise OSError(16, "Device or resource busy")
        real(path)

    monkeypatch.setattr(shutil, "rmtree", busy)
    with caplog.at_level(logging.WARNING):
        prune(tmp_path, tmp_path / step_name(3), 1)
    assert "step_00000001 cannot be removed ([Errno 16] Device or resource busy)" in caplog.text
    # The next one was removed all the same, and what is left of the first is no checkpoint.
    assert steps(tmp_path) == [1, 3]
    assert not (tmp_path / step_name(1) / "state.json").exists()
