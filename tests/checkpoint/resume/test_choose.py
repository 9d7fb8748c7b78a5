"""Which checkpoint is found, and which one a run resumes from when files are corrupt."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from support.messages import assert_facts, user_error

from megatron_prealign.checkpoint.directory import latest_checkpoint, resolve_checkpoint, step_name
from megatron_prealign.checkpoint.manifest import FileRecord, find_problems, read_manifest, write_manifest
from megatron_prealign.checkpoint.resume.choose import (
    candidates,
    choose,
    partition_files,
    rename_damaged,
    warn_about_fallback,
)

BY_CHECKSUM = partial(find_problems, checksums=True)


def make(directory: Path, *steps: int, latest: int | str | None = None) -> Path:
    """Makes checkpoints of these steps; `latest` names the last one or the given one."""
    for step in steps:
        checkpoint = directory / step_name(step)
        checkpoint.mkdir(parents=True)
        for name in ("state.json", "__0_0.distcp", ".metadata"):
            (checkpoint / name).write_text(f"{name} of {step}")
        write_manifest(checkpoint, {})
    name = latest if isinstance(latest, str) else step_name(steps[-1] if latest is None else latest)
    (directory / "latest").write_text(name + "\n")
    return directory


def names(directories: Iterable[Path]) -> list[int]:
    return [int(directory.name.removeprefix("step_")) for directory in directories]


def test_found_by_its_path_its_directory_or_its_run(tmp_path: Path) -> None:
    directory = make(tmp_path / "checkpoints", 3, 5)
    newest = directory / "step_00000005"
    assert latest_checkpoint(directory) == newest
    assert resolve_checkpoint(directory) == resolve_checkpoint(tmp_path) == resolve_checkpoint(newest) == newest
    assert resolve_checkpoint(directory / "step_00000003") == directory / "step_00000003"


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert candidates(tmp_path) == candidates(tmp_path / "not_there") == []
    (tmp_path / "step_00000001").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_reason_why_no_checkpoint_is_found(tmp_path: Path) -> None:
    def assert_none(path: Path, *facts: str) -> None:
        with user_error(path, "no complete checkpoint", *facts):
            resolve_checkpoint(path)

    expected = ("expected a step_* directory", "`latest`", "run directory")
    assert_none(tmp_path, *expected)
    assert_none(tmp_path / "gone", "does not exist", *expected)
    (tmp_path / "file").write_text("x")
    assert_none(tmp_path / "file", "is a file", *expected)
    unfinished = tmp_path / "one" / "checkpoints" / "step_00000001"
    unfinished.mkdir(parents=True)
    for directory in (unfinished, unfinished.parent, tmp_path / "one"):
        assert_none(directory, "step_00000001", "manifest.json is missing")
    make(tmp_path / "two" / "checkpoints", 3)
    make(tmp_path / "three", 4)
    assert_none(tmp_path, "use one of three, two")
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    assert_none(tmp_path / "model", "Hugging Face", f"`megatron-prealign convert from-hf --model {tmp_path / 'model'}")


def test_missing_checkpoints_are_no_new_run(tmp_path: Path) -> None:
    for content in ("step_00000009", "nonsense", ""):
        (tmp_path / "latest").write_text(content + "\n")
        with user_error(tmp_path / "latest", content or "''", "remove latest"):
            candidates(tmp_path)
    (tmp_path / "latest").unlink()
    assert candidates(tmp_path) == []


@pytest.mark.parametrize("latest", ["step_00000009", "nonsense", "../step_00000005", "", None])
def test_latest_that_names_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, latest: str | None) -> None:
    directory = make(tmp_path, 3, 5, latest=latest or "")
    if latest is None:
        (tmp_path / "latest").unlink()
    (tmp_path / ".step_00000007.incomplete").mkdir()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(directory) == directory / "step_00000005"
        assert names(candidates(directory)) == [5, 3]
    first, second = (record.getMessage() for record in caplog.records)
    assert_facts(first, tmp_path / "latest", directory / "step_00000005")
    assert_facts(second, tmp_path / "latest", "all step_* directories")
    for message in (first, second):
        assert_facts(message, "is missing" if latest is None else latest if latest == "step_00000009" else repr(latest))


def test_steps_of_an_abandoned_branch_are_no_candidates(tmp_path: Path) -> None:
    assert names(candidates(make(tmp_path, 2, 4, 6, 8, latest=6))) == [6, 4, 2]
    # The order is by number, not by name.
    assert names(candidates(make(tmp_path, 100_000_001, 99_999_999, latest=100_000_001)))[:2] == [
        100_000_001,
        99_999_999,
    ]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut": (cut, "__0_0.distcp", "__0_0.distcp has 16 bytes, expected 17"),
    "bit": (flip_a_bit, "__0_0.distcp", "__0_0.distcp does not match its checksum"),
    "gone": (Path.unlink, ".metadata", ".metadata is missing"),
    "state": (flip_a_bit, "state.json", "state.json does not match its checksum"),
    "manifest": (cut, "manifest.json", "manifest.json is corrupt"),
    "no manifest": (Path.unlink, "manifest.json", "manifest.json is missing"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_corruption_is_reported_and_an_older_checkpoint_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    directory = make(tmp_path, 2, 4, 6)
    damage, file, problem = DAMAGE[case]
    damage(directory / "step_00000006" / file)
    directories = candidates(directory)
    with user_error(directory / "step_00000006", problem, "checkpoint.on_damage", "fall_back"):
        choose(directories, BY_CHECKSUM, "fail")
    choice = choose(directories, BY_CHECKSUM, "fall_back")
    assert choice.checkpoint == directory / "step_00000004"
    with caplog.at_level(logging.WARNING):
        warn_about_fallback(choice)
    (record,) = caplog.records
    assert_facts(record.getMessage(), directory / "step_00000006", problem, "from step_00000004", "2 steps")
    # Nothing is renamed before the run has resumed.
    assert names(candidates(directory)) == [6, 4, 2]
    rename_damaged(choice)
    assert sorted(path.name for path in directory.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004",
        "step_00000006.damaged",
    ]
    assert names(candidates(directory)) == [4, 2]
    assert choose(candidates(directory), BY_CHECKSUM, "fail").damaged == {}


def test_a_flipped_bit_is_found_by_its_checksum_only(tmp_path: Path) -> None:
    directory = make(tmp_path, 1) / "step_00000001"
    flip_a_bit(directory / "__0_0.distcp")
    assert find_problems(directory, checksums=False) == []
    assert len(find_problems(directory, checksums=True)) == 1


def test_only_corrupt_checkpoints_are_refused(tmp_path: Path) -> None:
    directory = make(tmp_path, 2, 4)
    for step in (2, 4):
        cut(directory / step_name(step) / "state.json")
    for on_damage in ("fail", "fall_back"):
        with user_error(
            directory / "step_00000002",
            "state.json has 14 bytes, expected 15",
            "checkpoint.directory",
            "logging.run_dir",
        ):
            choose(candidates(directory)[1:], BY_CHECKSUM, on_damage)  # type: ignore[arg-type]
    problem = "state.json has 14 bytes, expected 15"
    with user_error(directory, f"step_00000004: {problem}", f"step_00000002: {problem}", "checkpoint.directory"):
        choose(candidates(directory), BY_CHECKSUM, "fall_back")
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000002", "step_00000004"]


def test_only_renamed_checkpoints_are_no_new_run(tmp_path: Path) -> None:
    directory = make(tmp_path, 4)
    (directory / "step_00000004").rename(directory / "step_00000004.damaged")
    with user_error(directory, "step_00000004.damaged", "checkpoint.directory", "logging.run_dir"):
        candidates(directory)


def test_a_directory_that_was_renamed_before_is_kept(tmp_path: Path) -> None:
    directory = make(tmp_path, 2, 4)
    (directory / "step_00000004.damaged").mkdir()
    cut(directory / "step_00000004" / "state.json")
    rename_damaged(choose(candidates(directory), BY_CHECKSUM, "fall_back"))
    assert sorted(path.name for path in directory.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004.damaged",
        "step_00000004.damaged-2",
    ]


@pytest.mark.parametrize("dies_at", ["latest", "step_00000004.damaged"])
def test_killed_while_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str) -> None:
    """The next start finds the intact checkpoint, whatever was renamed."""
    import os

    directory = make(tmp_path, 2, 4)
    cut(directory / "step_00000004" / "state.json")
    real = {name: getattr(os, name) for name in ("replace", "rename")}

    def dying(name: str) -> Callable[[Path, Path], None]:
        def move(source: Path, target: Path) -> None:
            if Path(target).name == dies_at:
                raise KeyboardInterrupt
            real[name](source, target)

        return move

    for name in real:
        monkeypatch.setattr(os, name, dying(name))
    with pytest.raises(KeyboardInterrupt):
        rename_damaged(choose(candidates(directory), BY_CHECKSUM, "fall_back"))
    monkeypatch.undo()
    assert choose(candidates(directory), BY_CHECKSUM, "fall_back").checkpoint == directory / "step_00000002"


def test_partitions_contain_every_file_once_and_are_about_even(tmp_path: Path) -> None:
    records = {f"file_{number}": FileRecord(10_000 * number, "") for number in range(1, 40)}
    for parts in (1, 2, 7, 60):
        split = partition_files(records, parts)
        assert sorted(name for each in split for name in each) == sorted(records)
        loads = [sum(records[name].bytes for name in each) for each in split]
        # No part is larger than the smallest by more than one file.
        assert max(loads) - min(loads) <= 390_000
    assert read_manifest(make(tmp_path, 1) / "step_00000001").keys() == {"state.json", "__0_0.distcp", ".metadata"}


@pytest.mark.parametrize("suffix", ["", "-2"])
def test_a_renamed_checkpoint_is_refused(tmp_path: Path, suffix: str) -> None:
    """Its files may have the right sizes, so a reader that compares only sizes would use corrupt weights."""
    newest = make(tmp_path / "checkpoints", 3) / "step_00000003"
    renamed = newest.rename(newest.with_name(f"{newest.name}.damaged{suffix}"))
    with user_error(renamed, "found it corrupt", "use another checkpoint"):
        resolve_checkpoint(renamed)
