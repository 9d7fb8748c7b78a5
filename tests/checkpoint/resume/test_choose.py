"""Which checkpoint is found, and which one is gone on from when files are damaged."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest

from megatron_prealign.checkpoint.directory import latest_checkpoint, resolve_checkpoint, step_name
from megatron_prealign.checkpoint.manifest import FileRecord, find_problems, read_manifest, write_manifest
from megatron_prealign.checkpoint.resume.choose import candidates, choose, set_aside, shares, warn_of_fallback
from megatron_prealign.errors import UserError

BY_CHECKSUM = partial(find_problems, checksums=True)


def make(directory: Path, *steps: int, latest: int | str | None = None) -> Path:
    """Checkpoints of these steps; `latest` names the last or what is given."""
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


def test_found_by_itself_its_directory_or_its_run(tmp_path: Path) -> None:
    directory = make(tmp_path / "checkpoints", 3, 5)
    newest = directory / "step_00000005"
    assert latest_checkpoint(directory) == newest
    assert resolve_checkpoint(directory) == resolve_checkpoint(tmp_path) == resolve_checkpoint(newest) == newest
    assert resolve_checkpoint(directory / "step_00000003") == directory / "step_00000003"


def test_none_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert candidates(tmp_path) == candidates(tmp_path / "not_there") == []
    (tmp_path / "step_00000001").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_why_there_is_none(tmp_path: Path) -> None:
    def said(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            resolve_checkpoint(path)
        assert str(caught.value).startswith(f"{path} holds no complete checkpoint") and "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{path} holds no complete checkpoint")

    expected = "; expected a step_* directory, a directory with `latest`, or a run's directory"
    assert said(tmp_path) == expected
    assert said(tmp_path / "gone") == f": there is no such directory{expected}"
    (tmp_path / "file").write_text("x")
    assert said(tmp_path / "file") == f": it is a file{expected}"
    unfinished = tmp_path / "one" / "checkpoints" / "step_00000001"
    unfinished.mkdir(parents=True)
    reason = "step_00000001 has no manifest.json, so that its save never came to its end; use another checkpoint"
    for directory in (unfinished, unfinished.parent, tmp_path / "one"):
        assert said(directory) == f": {reason}"
    make(tmp_path / "two" / "checkpoints", 3)
    make(tmp_path / "three", 4)
    assert said(tmp_path) == " itself, but directories with some: name one of three, two"
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_text("{}")
    assert (
        "it is a Hugging Face model directory; make a checkpoint of it with `megatron-prealign convert from-hf"
        in said(tmp_path / "model")
    )


def test_checkpoints_that_are_all_gone_are_no_new_run(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_00000009\n")
    with pytest.raises(UserError, match="names step_00000009, but neither that nor any other checkpoint is there"):
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
    assert first.startswith(f"{tmp_path / 'latest'} should name the newest checkpoint, but ")
    assert second.startswith(f"{tmp_path / 'latest'} should name the newest checkpoint, but ")


def test_steps_of_a_branch_that_was_left_are_no_candidates(tmp_path: Path) -> None:
    assert names(candidates(make(tmp_path, 2, 4, 6, 8, latest=6))) == [6, 4, 2]
    # Numbers decide, not names.
    assert names(candidates(make(tmp_path, 100_000_001, 99_999_999, latest=100_000_001)))[:2] == [
        100_000_001,
        99_999_999,
    ]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def swap_a_bit(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "cut": (cut, "__0_0.distcp", "__0_0.distcp has 16 bytes, expected 17"),
    "bit": (swap_a_bit, "__0_0.distcp", "__0_0.distcp has another checksum than when it was written"),
    "gone": (Path.unlink, ".metadata", ".metadata is missing"),
    "state": (swap_a_bit, "state.json", "state.json has another checksum than when it was written"),
    "manifest": (cut, "manifest.json", "manifest.json is damaged ("),
    "no manifest": (Path.unlink, "manifest.json", "manifest.json is missing: the checkpoint was never completed"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_and_an_older_one_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str) -> None:
    directory = make(tmp_path, 2, 4, 6)
    damage, file, told = DAMAGE[case]
    damage(directory / "step_00000006" / file)
    directories = candidates(directory)
    with pytest.raises(UserError) as caught:
        choose(directories, BY_CHECKSUM, "fail")
    assert str(caught.value).startswith(f"{directory / 'step_00000006'} is damaged: {told}")
    assert str(caught.value).endswith(
        "; restore it, or go on from an older checkpoint with checkpoint.on_damage fall_back"
    )
    choice = choose(directories, BY_CHECKSUM, "fall_back")
    assert choice.checkpoint == directory / "step_00000004"
    with caplog.at_level(logging.WARNING):
        warn_of_fallback(choice)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{directory / 'step_00000006'} is damaged ({told}")
    assert record.getMessage().endswith("): going on from step_00000004 instead, 2 steps are done again")
    # Nothing moves before the run really goes on.
    assert names(candidates(directory)) == [6, 4, 2]
    set_aside(choice)
    assert sorted(path.name for path in directory.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004",
        "step_00000006.damaged",
    ]
    assert names(candidates(directory)) == [4, 2]
    assert choose(candidates(directory), BY_CHECKSUM, "fail").damaged == {}


def test_a_swapped_bit_is_no_matter_of_size(tmp_path: Path) -> None:
    directory = make(tmp_path, 1) / "step_00000001"
    swap_a_bit(directory / "__0_0.distcp")
    assert find_problems(directory, checksums=False) == []
    assert len(find_problems(directory, checksums=True)) == 1


def test_no_good_one_left_is_refused(tmp_path: Path) -> None:
    directory = make(tmp_path, 2, 4)
    for step in (2, 4):
        cut(directory / step_name(step) / "state.json")
    for on_damage in ("fail", "fall_back"):
        with pytest.raises(UserError) as caught:
            choose(candidates(directory)[1:], BY_CHECKSUM, on_damage)  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"{directory / 'step_00000002'} is damaged: state.json has 14 bytes, expected 15; restore a "
            "checkpoint, or set checkpoint.directory (or logging.run_dir) to a new directory to begin anew"
        )
    with pytest.raises(UserError) as caught:
        choose(candidates(directory), BY_CHECKSUM, "fall_back")
    assert str(caught.value).startswith(
        f"{directory} holds no good checkpoint (step_00000004: state.json has 14 bytes, expected 15; step_00000002: "
    )
    assert sorted(path.name for path in directory.iterdir()) == ["latest", "step_00000002", "step_00000004"]


def test_damaged_ones_alone_are_no_reason_to_begin_anew(tmp_path: Path) -> None:
    directory = make(tmp_path, 4)
    (directory / "step_00000004").rename(directory / "step_00000004.damaged")
    with pytest.raises(UserError, match=r"holds damaged checkpoints alone \(step_00000004\.damaged\)"):
        candidates(directory)


def test_a_directory_that_was_set_aside_before_is_kept(tmp_path: Path) -> None:
    directory = make(tmp_path, 2, 4)
    (directory / "step_00000004.damaged").mkdir()
    cut(directory / "step_00000004" / "state.json")
    set_aside(choose(candidates(directory), BY_CHECKSUM, "fall_back"))
    assert sorted(path.name for path in directory.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004.damaged",
        "step_00000004.damaged-2",
    ]


@pytest.mark.parametrize("dies_at", ["latest", "step_00000004.damaged"])
def test_killed_while_setting_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str) -> None:
    """Whatever was renamed, the next start finds the good one."""
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
        set_aside(choose(candidates(directory), BY_CHECKSUM, "fall_back"))
    monkeypatch.undo()
    assert choose(candidates(directory), BY_CHECKSUM, "fall_back").checkpoint == directory / "step_00000002"


def test_shares_are_every_file_once_and_about_even(tmp_path: Path) -> None:
    records = {f"file_{number}": FileRecord(10_000 * number, "") for number in range(1, 40)}
    for parts in (1, 2, 7, 60):
        split = shares(records, parts)
        assert sorted(name for each in split for name in each) == sorted(records)
        loads = [sum(records[name].bytes for name in each) for each in split]
        # No share is larger than the smallest by more than one file.
        assert max(loads) - min(loads) <= 390_000
    assert read_manifest(make(tmp_path, 1) / "step_00000001").keys() == {"state.json", "__0_0.distcp", ".metadata"}
