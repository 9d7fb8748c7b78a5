"""Retention keeps the newest checkpoints of the current branch, every n-th and the best; corrupt ones do not count."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts

from megatron_prealign.checkpoint.directory import step_name
from megatron_prealign.checkpoint.manifest import write_manifest
from megatron_prealign.checkpoint.retention import prune, remove_unfinished
from megatron_prealign.recipe import CheckpointSection

SUMMARY: dict[str, Any] = {
    "kind": "weights",
    "vocab_size": 8,
    "padded_vocab_size": 8,
    "tokenizer_fingerprint": "sha256:x",
    "model": {},
    "layout": {},
    "source": {},
}


def write(directory: Path, *steps: int, metrics: dict[int, dict[str, Any]] | None = None) -> None:
    for step in steps:
        checkpoint = directory / step_name(step)
        checkpoint.mkdir()
        summary = {**SUMMARY, "metrics": (metrics or {}).get(step, {})}
        (checkpoint / "state.json").write_text(json.dumps(summary))
        write_manifest(checkpoint, {})


def steps(directory: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in directory.glob("step_*"))


def prune_after(directory: Path, newest: int, **section: Any) -> list[int]:
    prune(directory, directory / step_name(newest), CheckpointSection(**section))
    return steps(directory)


@pytest.mark.parametrize(
    ("existing", "newest", "keep", "left"),
    [
        ([1, 2, 3], 3, 1, [3]),
        ([1, 2, 3], 3, 2, [2, 3]),
        ([1, 2, 3], 3, 5, [1, 2, 3]),
        # Rolled back to 2, then 3 was written: 8 and 9 are of the abandoned branch.
        ([2, 3, 8, 9], 3, 2, [2, 3]),
        ([2, 3, 9], 3, 1, [3]),
        ([1, 2, 3, 8, 9], 3, 4, [1, 2, 3, 9]),
    ],
)
def test_abandoned_steps_go_first_then_the_oldest(
    tmp_path: Path, existing: list[int], newest: int, keep: int, left: list[int]
) -> None:
    write(tmp_path, *existing)
    assert prune_after(tmp_path, newest, keep=keep) == left


def test_more_steps_than_eight_digits_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(tmp_path, 99_999_999, 100_000_000, 100_000_001)
    assert prune_after(tmp_path, 100_000_001, keep=2) == [100_000_000, 100_000_001]


@pytest.mark.parametrize(("keep", "left"), [(1, [4, 8, 9]), (2, [4, 8, 9]), (3, [4, 7, 8, 9])])
def test_every_nth_is_kept_in_addition_to_the_newest(tmp_path: Path, keep: int, left: list[int]) -> None:
    write(tmp_path, *range(1, 10))
    assert prune_after(tmp_path, 9, keep=keep, keep_every=4) == left


LOSSES = {1: {"loss/en": 5.0}, 2: {"loss/en": 3.0}, 3: {"loss/en": 4.0, "p": 0.5}, 4: {}}


@pytest.mark.parametrize(
    ("name", "mode", "metrics", "left"),
    [
        ("loss/en", "min", LOSSES, [2, 4]),
        ("loss/en", "max", LOSSES, [1, 4]),
        ("p", "max", LOSSES, [3, 4]),
        ("unknown", "min", LOSSES, [4]),
        # Of equal ones the newest; a value that is not a number is never the best.
        ("loss/en", "min", {1: {"loss/en": 2.0}, 2: {"loss/en": 2.0}, 3: {"loss/en": float("nan")}}, [2, 4]),
        ("loss/en", "min", {1: {"loss/en": "low"}, 2: {"loss/en": None}, 3: {"loss/en": 9}}, [3, 4]),
        # The newest is the best.
        ("loss/en", "min", {**LOSSES, 4: {"loss/en": 1.0}}, [4]),
    ],
)
def test_the_best_is_kept(tmp_path: Path, name: str, mode: str, metrics: dict[int, Any], left: list[int]) -> None:
    write(tmp_path, 1, 2, 3, 4, metrics=metrics)
    assert prune_after(tmp_path, 4, keep=1, keep_best=name, keep_best_mode=mode) == left


@pytest.mark.parametrize("damage", ["cut", "gone", "no_manifest", "bad_manifest"])
def test_corrupt_checkpoints_are_not_counted_and_not_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    write(tmp_path, 1, 2, 3, 4)
    corrupt = tmp_path / step_name(3)
    if damage == "cut":
        (corrupt / "state.json").write_text("{")
    elif damage == "gone":
        (corrupt / "state.json").unlink()
    elif damage == "no_manifest":
        (corrupt / "manifest.json").unlink()
    else:
        (corrupt / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING, logger="megatron_prealign.checkpoint.retention"):
        # If 3 were intact, these would be 3 and 4.
        assert prune_after(tmp_path, 4, keep=2) == [2, 3, 4]
        # Logged once, not after every save.
        prune_after(tmp_path, 4, keep=2)
    [warning] = caplog.messages
    assert_facts(warning, corrupt, "checkpoint.keep", "manifest.json" if "manifest" in damage else "state.json")


def test_the_checkpoint_that_latest_names_is_kept(tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 3)
    (tmp_path / "latest").write_text("step_00000001\n")
    assert prune_after(tmp_path, 3, keep=1) == [1, 3]


def test_directories_of_the_user_are_not_removed(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    for name in ("step_00000001_best", "step_00000001.damaged"):
        shutil.copytree(tmp_path / step_name(1), tmp_path / name)
    prune(tmp_path, tmp_path / step_name(2), CheckpointSection(keep=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001.damaged",
        "step_00000001_best",
        "step_00000002",
    ]


def test_unfinished_directories_of_any_step_are_removed(tmp_path: Path) -> None:
    write(tmp_path, 4)
    for kind in (".step_00000003", ".step_00000099", ".step_00000004.abandoned", ".step_00000002.removed"):
        shutil.copytree(tmp_path / step_name(4), tmp_path / f"{kind}.incomplete")
    (tmp_path / ".latest.incomplete").write_text("step_00000004\n")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".latest.incomplete", "step_00000004"]


def test_an_interrupted_removal_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, 2, 3)
    real = shutil.rmtree

    def fail(path: Path, *args: Any) -> None:
        if "00000001" in path.name:
            raise PermissionError(13, "Permission denied")
        real(path, *args)

    monkeypatch.setattr(shutil, "rmtree", fail)
    with caplog.at_level(logging.INFO, logger="megatron_prealign.checkpoint.retention"):
        assert prune_after(tmp_path, 3, keep=1) == [3]
    warning, removed = caplog.messages
    assert_facts(warning, tmp_path, "step_00000001", "Permission denied")
    assert_facts(removed, "removed", tmp_path / "step_00000002", "checkpoint.keep is 1")
    monkeypatch.undo()
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]
