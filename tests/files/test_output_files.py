"""Output files: rename order within a group, and outputs that cannot be created."""

import os
from pathlib import Path

import pytest
from support.messages import assert_refused, user_error
from support.tiny import Tiny

from megatron_prealign import cli
from megatron_prealign.files.atomic import write_all_atomically


def test_the_last_target_is_renamed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = []
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        renamed.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    with write_all_atomically([tmp_path / name for name in ("first", "second", "last")]) as paths:
        for path, name in zip(paths, ("first", "second", "last"), strict=True):
            path.write_text(name)
    assert renamed == ["first", "second", "last"]
    assert [(tmp_path / name).read_text() for name in renamed] == renamed


@pytest.mark.parametrize("obstacle", ["first", "second", "last"])
def test_a_directory_in_the_way_of_a_group_costs_no_file(tmp_path: Path, obstacle: str) -> None:
    targets = [tmp_path / name for name in ("first", "second", "last")]
    for target in targets:
        target.write_text("old")
    (tmp_path / obstacle).unlink()
    (tmp_path / obstacle).mkdir()
    with user_error(tmp_path / obstacle, "directory"), write_all_atomically(targets) as paths:
        for path in paths:
            path.write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "last", "second"]
    assert {target.read_text() for target in targets if target.is_file()} == {"old"}


@pytest.mark.parametrize("command", ["preprocess", "train-tokenizer"])
@pytest.mark.parametrize("inside", ["out", "deep/out"])
def test_output_below_a_file(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, inside: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    output = tmp_path / "file" / inside
    options = {
        "preprocess": ["--tokenizer", tiny.tokenizer, "--language", "en", "--workers", "1"],
        "train-tokenizer": ["--vocab-size", "300"],
    }[command]
    corpus = str(tiny.directory / "corpus.jsonl")
    status = cli.main([command, "--input", corpus, "--output", str(output), *options])
    assert_refused(status, capsys.readouterr().err, output.parent, f"{tmp_path / 'file'} is a file")
