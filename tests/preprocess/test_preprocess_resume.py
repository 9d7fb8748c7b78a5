"""Runs that end early: at any point, no partial output is accepted as a dataset, and a later run resumes."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from support.messages import assert_facts, user_error
from support.preprocess_runs import SETTINGS, files, inputs, make_inputs, run, text

from megatron_prealign.cli import main
from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.corpus.readers import Fields
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.preprocess import journal as module
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.preprocess.tokenise import BlockTokeniser
from megatron_prealign.preprocess.train_tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("resume"))


class Killed(BaseException):
    """Ends a run without cleanup."""


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Simulates a kill before the given step that changes something on disk; returns a function that counts the
    steps."""
    steps = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps >= step:
                raise Killed
            return call(*arguments, **options)

        return counting

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(os, "fsync", counted(os.fsync))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(module.TokenWriter, "append", counted(module.TokenWriter.append))
    return lambda: steps


@pytest.mark.slow
@pytest.mark.parametrize("segmenter", [None, "support.word_cutters:KnownWords"])
def test_a_run_killed_at_any_step_resumes_with_the_same_bytes(
    directory: Path, tmp_path: Path, segmenter: str | None
) -> None:
    settings = replace(SETTINGS, segmenter=segmenter)
    run(directory, tmp_path / "complete/x", settings)
    expected = files(tmp_path / "complete/x")
    old = tmp_path / "old/x"
    preprocess(
        [directory / "b.txt"],
        directory / "tok",
        old,
        replace(settings, segmenter="support.word_cutters:KnownWords"),
        False,
    )
    step, resumed, untouched = 0, 0, 0
    while True:
        step += 1
        out = tmp_path / f"killed{step}/x"
        shutil.copytree(old.parent, out.parent)
        with pytest.MonkeyPatch.context() as patch:
            count = kill_at(step, patch)
            try:
                run(directory, out, settings)
            except Killed:
                pass
            else:
                break
            assert count() >= step
        found = {path.name[1:]: path.read_bytes() for path in out.parent.glob("x.*") if path.is_file()}
        if ".json" in found:
            # A sidecar always matches its dataset, the old or the new one.
            sidecar = load_sidecar(out)
            assert found[".bin"] in (files(old)[".bin"], expected[".bin"])
            assert sidecar == load_sidecar(old if found[".bin"] == files(old)[".bin"] else tmp_path / "complete/x")
            untouched += 1
        resumed += (out.parent / "x.unfinished/journal.json").exists()
        run(directory, out, replace(settings, resume=True))
        assert files(out) == expected, step
        shutil.rmtree(out.parent)
    # Most steps are between the first journal and the end.
    assert step > 40 and resumed > 0.8 * step and untouched > 0.7 * step


@pytest.mark.parametrize("at", [2, 8])
def test_a_full_disk_keeps_what_was_saved(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    append, count = module.TokenWriter.append, 0

    def full(self: module.TokenWriter, texts: Any) -> None:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, texts)

    out = tmp_path / "x"
    with monkeypatch.context() as patch:
        patch.setattr(module.TokenWriter, "append", full)
        with user_error(f"{out}.unfinished", "No space left on device") as caught:
            run(directory, out, SETTINGS)
    is_saved = at > 2
    assert (f"documents in {out}.unfinished" in str(caught.value)) == is_saved
    assert (tmp_path / "x.unfinished").exists() == is_saved
    assert not (tmp_path / "x.bin").exists()
    run(directory, out, replace(SETTINGS, resume=True))
    run(directory, tmp_path / "y", SETTINGS)
    assert files(out) == files(tmp_path / "y")


def test_the_reported_number_of_saved_documents(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_index", full)
    # The second time, it resumes from what is saved.
    for resume in (False, True):
        with user_error("No space left on device") as caught:
            run(directory, tmp_path / "x", replace(SETTINGS, resume=resume))
        journal = json.loads((tmp_path / "x.unfinished/journal.json").read_text())
        saved = sum(state["documents"] for state in journal["outputs"])
        assert 0 < saved < 80
        assert_facts(str(caught.value), f"(saved {saved} documents in", "--resume")


def interrupted(directory: Path, out: Path, monkeypatch: pytest.MonkeyPatch, settings: PreprocessSettings) -> None:
    """Leaves an unfinished run."""
    append, count = module.TokenWriter.append, 0

    def interrupt(self: module.TokenWriter, texts: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        append(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(module.TokenWriter, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(directory, out, settings)
    assert (out.parent / "x.unfinished").is_dir()


def test_only_a_run_with_the_same_settings_resumes(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x"
    interrupted(directory, out, monkeypatch, SETTINGS)
    with user_error(f"{out}.unfinished: ", "unfinished run", "--resume", "remove"):
        run(directory, out, SETTINGS)
    same = replace(SETTINGS, resume=True)
    for other, fact in [
        (replace(same, language="ja"), "language was zh, is ja"),
        (replace(same, fields=Fields(("l",))), "text_keys was ['text'], is ['l']"),
        (replace(same, segmenter="support.word_cutters:KnownWords"), "segmenter was None"),
        (replace(same, use_fast_engine=True), "fast engine was False, is True"),
        (replace(same, limits=Limits(block_bytes=2501)), "block_bytes was 2500, is 2501"),
    ]:
        with user_error(f"{out}.unfinished: ", fact):
            run(directory, out, other)
    with user_error(f"{out}.unfinished: ", "inputs was"):
        preprocess([directory / "a.jsonl"], directory / "tok", out, same, show_progress=False)
    train_tokenizer([directory / "a.jsonl"], tmp_path / "tok", 271, on_error="skip", show_progress=False)
    with user_error(f"{out}.unfinished: ", "tokenizer was sha256"):
        preprocess(inputs(directory), tmp_path / "tok", out, same, show_progress=False)
    shutil.rmtree(tmp_path / "tok")
    touched = os.stat(directory / "b.txt")
    os.utime(directory / "b.txt", ns=(touched.st_atime_ns, touched.st_mtime_ns + 1_000_000))
    with user_error(f"{out}.unfinished: ", "inputs was"):
        run(directory, out, same)
    os.utime(directory / "b.txt", ns=(touched.st_atime_ns, touched.st_mtime_ns))
    with open(tmp_path / "x.unfinished/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with user_error(f"{out}.unfinished: another process", str(out)):
            run(directory, out, same)
    # The error policy and the number of workers do not change the output.
    result = preprocess(inputs(directory), directory / "tok", out, replace(same, workers=2), show_progress=False)
    assert 0 < result.text_bytes < result.sidecar.bytes
    run(directory, tmp_path / "y", SETTINGS)
    assert files(out) == files(tmp_path / "y")


def test_the_lock_of_a_removed_directory_blocks_nobody(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run removes the directory between opening and locking of the lock file."""
    flock, calls = fcntl.flock, []

    def late(lock: Any, operation: int) -> None:
        calls.append(operation)
        if len(calls) < 3:
            shutil.rmtree(tmp_path / "x.unfinished")
        if len(calls) == 2:
            # And a third run has created it again.
            (tmp_path / "x.unfinished").mkdir()
        flock(lock, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    run(directory, tmp_path / "x", SETTINGS)
    assert len(calls) == 3
    assert (tmp_path / "x.bin").exists() and not (tmp_path / "x.unfinished").exists()


def test_a_file_system_without_locks(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*arguments: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unknown)
    run(directory, tmp_path / "x", SETTINGS)
    assert (tmp_path / "x.bin").exists()


def test_everything_is_synced_before_it_is_recorded(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only synced data survives a power failure: files are synced before the journal that refers to them, the removal
    of an old sidecar before the first rename, renames before the directory of the run is removed."""
    settings = replace(SETTINGS, segmenter="support.word_cutters:KnownWords")
    run(directory, tmp_path / "x", settings)
    synced: dict[int, int] = {}
    events: list[str] = []
    fsync, save, move = os.fsync, module.UnfinishedRun.save, os.replace
    sync_directory, rmtree = module.sync_directory, shutil.rmtree

    def recorded(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        fsync(descriptor)

    def checked(self: module.UnfinishedRun) -> None:
        save(self)
        ends = ("bin", "lengths", "words") + (("idx", "json") if self.journal.is_complete else ())
        for writer in self.writers:
            for ending in ends:
                status = writer.paths[ending].stat()
                assert synced.get(status.st_ino) == status.st_size, ending

    def moved(source: Any, target: Any) -> None:
        if Path(target).parent == tmp_path:
            events.append(Path(target).name)
        move(source, target)

    def directory_synced(path: Path) -> None:
        events.append("sync" if path == tmp_path else "")
        sync_directory(path)

    def removed(path: Path, **options: Any) -> None:
        events.append("removed")
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", recorded)
    monkeypatch.setattr(os, "replace", moved)
    monkeypatch.setattr(module.UnfinishedRun, "save", checked)
    monkeypatch.setattr(module, "sync_directory", directory_synced)
    monkeypatch.setattr(shutil, "rmtree", removed)
    run(directory, tmp_path / "x", settings)
    assert events == ["sync", "x.bin", "x.idx", "x.words", "x.json", "sync", "removed"]


def test_the_command_resumes(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append, count = module.TokenWriter.append, 0

    def interrupt(self: module.TokenWriter, texts: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        append(self, texts)

    arguments = ["preprocess", "--input", str(directory / "b.txt"), str(directory / "a.jsonl"), "--tokenizer"]
    arguments += [
        str(directory / "tok"),
        "--language",
        "zh",
        "--on-error",
        "skip",
        "--engine",
        "plain",
        "--workers",
        "1",
    ]
    arguments += ["--output", str(tmp_path / "x"), "--save-every-mb", "0.001"]
    with monkeypatch.context() as patch:
        patch.setattr(module.TokenWriter, "append", interrupt)
        assert main(arguments) == 130
    assert main(arguments) == 2
    assert_facts(capsys.readouterr().err, f"{tmp_path / 'x'}.unfinished: ", "unfinished run", "--resume")
    assert main([*arguments, "--resume"]) == 0
    sidecar = load_sidecar(tmp_path / "x")
    assert (sidecar.documents, sidecar.engine) == (80, "tokenizers")


def test_a_resumed_run_does_not_use_an_engine_that_was_wrong(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = BlockTokeniser.engine

    def wrong(self: BlockTokeniser, language: str) -> Any:
        right = engine(self, language)

        def encode(texts: list[str]) -> Any:
            ids, offsets = right(texts)
            ids = ids.copy()
            for number, line in enumerate(texts):
                if "14 dog" in line:
                    ids[offsets[number]] += 1
            return ids, offsets

        return encode

    pytest.importorskip("gigatoken")
    monkeypatch.setattr(BlockTokeniser, "engine", wrong)
    generator = numpy.random.default_rng(2)
    texts = ["14 dog"] * 40 + [text(generator) for _ in range(80)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    settings = replace(SETTINGS, use_fast_engine=True)
    preprocess([path], directory / "tok", tmp_path / "y", settings, show_progress=False)
    append, count = module.TokenWriter.append, 0

    def interrupt(self: module.TokenWriter, texts: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        append(self, texts)

    with monkeypatch.context() as patch:
        patch.setattr(module.TokenWriter, "append", interrupt)
        with pytest.raises(KeyboardInterrupt):
            preprocess([path], directory / "tok", tmp_path / "x", settings, show_progress=False)
    plain_calls: list[bool] = []
    call = BlockTokeniser.__call__

    def recorded(self: BlockTokeniser, block: Any, plain: bool) -> Any:
        plain_calls.append(plain)
        return call(self, block, plain)

    monkeypatch.setattr(BlockTokeniser, "__call__", recorded)
    preprocess([path], directory / "tok", tmp_path / "x", replace(settings, resume=True), show_progress=False)
    assert plain_calls and all(plain_calls)
    assert files(tmp_path / "x") == files(tmp_path / "y")


@pytest.mark.parametrize("corruption", ["journal", "short", "version"])
def test_a_corrupt_unfinished_run_is_one_line(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corruption: str
) -> None:
    interrupted(directory, tmp_path / "x", monkeypatch, SETTINGS)
    journal = tmp_path / "x.unfinished/journal.json"
    if corruption == "journal":
        journal.write_text(journal.read_text()[:-5])
    elif corruption == "version":
        journal.write_text(journal.read_text().replace('"format_version": 1', '"format_version": 7'))
    else:
        os.truncate(tmp_path / "x.unfinished/0.bin", 100)
    facts = {
        "journal": (f"{journal}: cannot read journal",),
        "version": (f"{journal}: cannot read journal", "format version 7, expected 1"),
        "short": (f"{journal.parent}/0.bin: got 100 bytes, expected", "journal"),
    }[corruption]
    with user_error(*facts, "start from scratch") as caught:
        run(directory, tmp_path / "x", replace(SETTINGS, resume=True))
    # Resuming is impossible.
    assert "--resume" not in str(caught.value)
    # Nothing is deleted.
    assert journal.exists()


@pytest.mark.parametrize("added", [b"", b'{"text": "late"}\n'])
def test_an_input_that_changes_is_noticed(directory: Path, tmp_path: Path, monkeypatch: Any, added: bytes) -> None:
    path = tmp_path / "a.jsonl"
    shutil.copy(directory / "a.jsonl", path)
    finish = module.UnfinishedRun.save

    def touched(self: module.UnfinishedRun) -> None:
        path.write_bytes(path.read_bytes() + added)
        os.utime(path, (1, 1))
        finish(self)

    monkeypatch.setattr(module.UnfinishedRun, "save", touched)
    with user_error(f"{path}: ", "changed while it was read"):
        preprocess([path], directory / "tok", tmp_path / "x", SETTINGS, show_progress=False)
    assert not (tmp_path / "x.bin").exists()


def test_read_only_output(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with user_error(f"{tmp_path}/file is a file"):
        run(directory, tmp_path / "file/x", SETTINGS)
    if os.geteuid() == 0:
        return
    (tmp_path / "locked").mkdir(mode=0o555)
    with user_error(f"{tmp_path}/locked/x.unfinished", "Permission denied"):
        run(directory, tmp_path / "locked/x", SETTINGS)
