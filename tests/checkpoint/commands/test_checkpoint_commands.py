"""`checkpoint list | inspect | verify | export-weights`: their output and the problems they find, without a GPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoint_directories import LAYERS, STACKED, make_checkpoint, make_run, make_weights, summary_of
from support.messages import assert_facts, user_error

from megatron_prealign.checkpoint.commands.export import export_weights
from megatron_prealign.checkpoint.commands.list import list_checkpoints
from megatron_prealign.checkpoint.directory import directory_bytes
from megatron_prealign.checkpoint.manifest import find_damage, read_manifest
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.state import read_state
from megatron_prealign.cli import main
from megatron_prealign.errors import UserError
from megatron_prealign.text import readable_bytes


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints; tests that change it copy it."""
    run_dir = tmp_path_factory.mktemp("original") / "run"
    make_run(run_dir, [10, 20, 100])
    return run_dir


@pytest.fixture
def run_dir(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def run_command(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    status = main(["checkpoint", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out + (captured.err if status == 2 else "")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    with ShardReader(directory) as reader:
        return {key: reader.read(key) for key in reader.tensors}


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_list_shows_every_checkpoint(original: Path, inner: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run_command(capsys, "list", original / inner)
    lines = [line.split() for line in text.splitlines()]
    assert status == 0 and len(lines) == 4
    assert [line[0] for line in lines[1:]] == ["step_00000010", "step_00000020", "step_00000100"]
    assert [("*" in line) for line in lines[1:]] == [False, False, True]
    assert "complete" in lines[1] and "language_model" in lines[1] and "10,000" in lines[1] and "4.9" in lines[1]


def test_list_shows_problems(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints"
    (directory / "step_00000010" / "manifest.json").unlink()
    (directory / "step_00000020" / "recipe.yaml").write_text("longer than it was", encoding="utf-8")
    (directory / "step_00000020" / "common.pt").unlink()
    (directory / "step_00000100" / "state.json").unlink()
    shutil.copytree(directory / "step_00000020", directory / "step_00000030.damaged")
    (directory / ".step_00000110.incomplete").mkdir()
    make_checkpoint(directory / "base", 5, kind="weights", source={})
    listed = {each.name: each for each in list_checkpoints(run_dir)}
    assert list(listed) == [
        "step_00000010",
        "step_00000020",
        "step_00000030.damaged",
        "step_00000100",
        ".step_00000110.incomplete",
        "base",
    ]
    assert listed["step_00000010"].status == "incomplete"
    assert listed["step_00000020"].status == listed["step_00000030.damaged"].status == "corrupt"
    assert len(listed["step_00000020"].problems) == 2
    assert listed["step_00000100"].status == "corrupt" and listed["step_00000100"].step == 100
    assert listed[".step_00000110.incomplete"].status == "incomplete"
    assert (listed["base"].status, listed["base"].kind) == ("complete", "weights")
    _, text = run_command(capsys, "list", run_dir)
    assert "common.pt is missing" in text and "recipe.yaml has 18 bytes, expected 10" in text
    assert_facts(text.splitlines()[-1], "warning", directory / "latest", "'step_00000100'")


def test_list_of_one_checkpoint_as_json(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run_command(capsys, "list", "--path", original / "checkpoints" / "step_00000100", "--json")
    (one,) = json.loads(text)
    assert status == 0
    assert one["status"] == "complete" and one["latest"] and one["step"] == 100 and one["tokens"] == 100_000
    assert one["metrics"] == {"validation_loss/en": 4.0}
    assert one["bytes"] == sum(
        f.stat().st_size for f in (original / "checkpoints" / one["name"]).rglob("*") if f.is_file()
    )


def test_the_current_directory(
    original: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(original)
    assert "step_00000100 *" in run_command(capsys, "list", ".")[1]
    monkeypatch.chdir(original / "checkpoints" / "step_00000100")
    assert "step_00000100 *" in run_command(capsys, "list", ".")[1]
    for action in ("inspect", "verify"):
        assert run_command(capsys, action, ".")[0] == 0
    status, text = run_command(capsys, "export-weights", "--checkpoint", ".", "--output", ".")
    assert status == 2
    assert_facts(text, "--output .", "checkpoint itself")
    monkeypatch.chdir(original)
    status, text = run_command(capsys, "export-weights", "--checkpoint", ".", "--output", ".", "--overwrite")
    assert status == 2
    assert_facts(text, "error: . is not", "new directory")


def test_a_directory_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    for action in ("list", "inspect", "verify"):
        status, text = run_command(capsys, action, tmp_path)
        assert status == 2 and str(tmp_path) in text and "\n" not in text.strip()
        assert run_command(capsys, action, tmp_path / "none")[0] == 2


def test_listing_imports_no_torch(original: Path) -> None:
    code = "import sys; from megatron_prealign.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "checkpoint", "list", str(original)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "step_00000100 *" in done.stdout, done.stderr


def test_inspect_shows_model_and_run(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run_command(capsys, "inspect", original)
    assert status == 0
    # 2 x 6 rows of 4 without padding, 2 layers of 4 x 6, and a norm of 4.
    assert f"parameters    {2 * 6 * 4 + 2 * 4 * 6 + 4:,} (float32)" in text
    for part in (
        "step_00000100: complete",
        "llama: num_layers 2",
        "6 ids, padded to 8",
        "TP 2, PP 1, VPP 1, DP 3",
        "validation_loss/en 4",
        "consumed      en 800",
        "phase language_model",
        "tokenizer.json",
    ):
        assert part in text
    assert STACKED not in text
    assert f"optimizer.state.exp_avg.{STACKED}" in run_command(capsys, "inspect", original, "--tensors")[1]


def test_inspect_as_json(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(run_command(capsys, "inspect", original, "--json")[1])
    assert report["tensors"][STACKED] == {"shape": [2, 4, 6], "dtype": "float32", "bytes": 192}
    assert report["weights"] == {"tensors": 4, "bytes": (2 * 8 * 4 + 48 + 4) * 4, "dtype": "float32"}
    assert report["other_tensors"]["tensors"] == 5
    assert report["run"]["seed"] == 7 and report["problems"] == [] and report["kind"] == "run"


def test_inspect_of_a_corrupt_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints" / "step_00000100"
    (directory / "recipe.yaml").unlink()
    assert "problem: recipe.yaml is missing" in run_command(capsys, "inspect", run_dir)[1]
    (directory / ".metadata").write_bytes(b"")
    status, text = run_command(capsys, "inspect", run_dir)
    assert status == 2 and ".metadata" in text


def test_verify_reads_everything(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints"
    status, text = run_command(capsys, "verify", run_dir)
    assert status == 0 and "step_00000100: 9 files" in text and "step_00000020" not in text
    flip_a_byte(directory / "step_00000020" / "__1_0.distcp")
    (directory / "step_00000020" / "tokenizer" / "tokenizer.json").unlink()
    (directory / "step_00000100" / "notes.txt").write_text("mine", encoding="utf-8")
    status, text = run_command(capsys, "verify", run_dir, "--all", "--workers", 2)
    assert status == 1
    assert "step_00000020: __1_0.distcp does not match its checksum" in text
    assert "step_00000020: tokenizer/tokenizer.json is missing" in text
    assert "step_00000100/notes.txt is not in the manifest" in text
    assert_facts(text.splitlines()[-1], "3 checkpoints", "1 corrupt")
    assert run_command(capsys, "verify", directory / "step_00000100")[0] == 0
    assert run_command(capsys, "verify", directory / "step_00000020")[0] == 1


def test_verify_without_a_manifest_or_a_state(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints" / "step_00000100"
    (directory / "state.json").unlink()
    status, text = run_command(capsys, "verify", directory)
    assert status == 1 and "state.json is missing" in text
    (run_dir / "checkpoints" / "step_00000020" / "manifest.json").unlink()
    status, text = run_command(capsys, "verify", run_dir / "checkpoints" / "step_00000020")
    assert status == 1 and "manifest.json is missing" in text


def test_verify_checks_what_latest_names(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not an older checkpoint that is intact."""
    directory = run_dir / "checkpoints"
    (directory / "step_00000100" / "manifest.json").unlink()
    for path in (run_dir, directory):
        status, text = run_command(capsys, "verify", path)
        assert status == 1 and "corrupt:" in text and "step_00000100" in text and "step_00000020" not in text
    shutil.rmtree(directory / "step_00000100")
    for flags in ([], ["--all"]):
        status, text = run_command(capsys, "verify", run_dir, *flags)
        assert status == 1
        assert_facts(text, f"corrupt: {directory / 'latest'} names step_00000100", "does not exist")
        assert "step_00000020: 9 files" in text
    for step in (10, 20):
        shutil.rmtree(directory / f"step_{step:08}")
    status, text = run_command(capsys, "verify", run_dir)
    assert status == 1 and "does not exist" in text


def test_verify_finds_an_invalid_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest matches: the file was invalid when it was written."""
    directory = make_checkpoint(tmp_path / "step_00000001", 1, layout=3)
    status, text = run_command(capsys, "verify", directory)
    assert status == 1 and "state.json is corrupt (layout is 3, expected dict)" in text


def test_renamed_checkpoints_are_not_verified_with_all(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints"
    os.replace(directory / "step_00000010", directory / "step_00000010.damaged")
    flip_a_byte(directory / "step_00000010.damaged" / "__0_0.distcp")
    status, text = run_command(capsys, "verify", run_dir, "--all")
    assert status == 0 and "verified 2 checkpoints" in text and "none corrupt" in text


def test_export_of_the_weights(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "weights"
    status, text = run_command(capsys, "export-weights", "--checkpoint", original, "--output", output)
    assert status == 0 and "4 tensors, 116 parameters, float32" in text
    exported, expected = tensors_of(output), make_weights(100)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[key], expected[key]) for key in expected)
    summary = read_state(output)
    assert summary["kind"] == "weights" and summary["model"] == summary_of(100)["model"]
    assert summary["vocab_size"] == 6 and summary["padded_vocab_size"] == 8
    assert summary["source"]["step"] == 100 and summary["source"]["metrics"] == {"validation_loss/en": 4.0}
    assert (output / "tokenizer" / "tokenizer.json").exists() and not (output / "recipe.yaml").exists()
    assert find_damage(output, read_manifest(output), checksums=True) == []
    assert os.listdir(tmp_path) == ["weights"]
    # An export of an export has the same weights and source.
    again = tmp_path / "again"
    export_weights(output, again)
    assert read_state(again)["source"] == summary["source"]
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors_of(again).items())


def test_export_with_another_dtype(original: Path, tmp_path: Path) -> None:
    seen = []
    checkpoint = original / "checkpoints" / "step_00000100"
    result = export_weights(
        checkpoint, tmp_path / "out", dtype="bf16", progress=lambda now, total: seen.append((now, total))
    )
    assert result.bytes == 2 * result.parameters and result.dtype == "bfloat16"
    for key, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, make_weights(100)[key].bfloat16())
    assert json.loads((tmp_path / "out" / "huggingface" / "config.json").read_bytes())["dtype"] == "bfloat16"
    assert len(seen) == 3 + LAYERS and seen[-1] == (4 * result.parameters, 4 * result.parameters)


def test_existing_output_is_kept(original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("export-weights", "--checkpoint", original, "--output")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("all of it", encoding="utf-8")
    for flags in ([], ["--overwrite"]):
        status, text = run_command(capsys, *options, mine, *flags)
        assert status == 2
        assert_facts(text, mine, "contains files that", "choose another path")
    assert os.listdir(mine) == ["thesis.tex"]
    status, text = run_command(capsys, *options, mine / "thesis.tex")
    assert status == 2
    assert_facts(text, mine / "thesis.tex", "not a directory")
    of_a_run = make_checkpoint(tmp_path / "of_a_run", 4)
    status, text = run_command(capsys, *options, of_a_run, "--overwrite")
    assert status == 2 and (of_a_run / "recipe.yaml").exists()
    assert_facts(text, of_a_run, "contains files that", "choose another path")
    older = make_checkpoint(tmp_path / "older", 3, kind="weights")
    status, text = run_command(capsys, *options, older)
    assert status == 2
    assert_facts(text, older, "exists", "--overwrite")
    assert torch.equal(tensors_of(older)[STACKED], make_weights(3)[STACKED])
    assert run_command(capsys, *options, older, "--overwrite")[0] == 0
    assert torch.equal(tensors_of(older)[STACKED], make_weights(100)[STACKED])
    assert sorted(os.listdir(tmp_path)) == ["mine", "of_a_run", "older"]
    checkpoint = original / "checkpoints" / "step_00000100"
    with user_error(f"--output {checkpoint}", "checkpoint itself"):
        export_weights(checkpoint, checkpoint, overwrite=True)


def test_a_corrupt_checkpoint_is_not_exported(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run_dir / "checkpoints" / "step_00000100"
    shard = directory / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with user_error(f"{directory} is corrupt", "__0_0.distcp has"):
        export_weights(directory, tmp_path / "out")
    directory = run_dir / "checkpoints" / "step_00000020"
    flip_a_byte(directory / "__0_0.distcp")
    status, text = run_command(capsys, "export-weights", "--checkpoint", directory, "--output", tmp_path / "out")
    assert status == 2
    assert_facts(text, f"{directory} is corrupt", "__0_0.distcp does not match its checksum")
    assert not (tmp_path / "out").exists()


def test_the_output_is_checked_before_the_checkpoint_is_read(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint is corrupt: reading it first would raise that error."""
    directory = run_dir / "checkpoints" / "step_00000020"
    flip_a_byte(directory / "__0_0.distcp")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    options = ("export-weights", "--checkpoint", directory, "--output")
    status, text = run_command(capsys, *options, tmp_path / "file")
    assert status == 2
    assert_facts(text, tmp_path / "file", "not a directory")
    status, text = run_command(capsys, *options, tmp_path / "file" / "a" / "b")
    assert status == 2
    assert_facts(text, tmp_path / "file" / "a" / "b", f"{tmp_path / 'file'} is a file")


def test_overflow_of_the_output_dtype_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest bfloat16 value is a little smaller than that of float32."""
    from support import checkpoint_directories

    large = {**make_weights(1), "decoder.final_layernorm.weight": torch.full((4,), torch.finfo(torch.float32).max)}
    monkeypatch.setattr(checkpoint_directories, "make_weights", lambda seed: large)
    directory = make_checkpoint(tmp_path / "step_00000001", 1)
    with user_error(directory, "decoder.final_layernorm.weight", "too large for bfloat16", "--dtype"):
        export_weights(directory, tmp_path / "out", dtype="bf16")
    assert os.listdir(tmp_path) == ["step_00000001"]


@pytest.mark.slow
def test_a_disk_error_leaves_nothing_behind(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each call that changes the disk: either the old directory or the new one is intact."""
    calls = {"count": 0, "fail_at": 0}

    def failing(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls["count"] += 1
            if calls["count"] == calls["fail_at"]:
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        return call

    output = make_checkpoint(tmp_path / "out", 3, kind="weights")
    checkpoint = original / "checkpoints" / "step_00000100"
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing(os.replace))
        patch.setattr(os, "fsync", failing(os.fsync))
        patch.setattr(torch, "save", failing(torch.save))
        patch.setattr(shutil, "copytree", failing(shutil.copytree))
        patch.setattr(Path, "write_text", failing(Path.write_text))
        failures = 0
        while True:
            calls.update(count=0, fail_at=failures + 1)
            try:
                export_weights(checkpoint, output, overwrite=True)
            except UserError as error:
                assert "No space left on device" in str(error)
            else:
                break
            failures += 1
            kept = output if output.exists() else tmp_path / ".out.replaced"
            assert find_damage(kept, read_manifest(kept), checksums=True) == []
            assert not (tmp_path / ".out.incomplete").exists()
    assert failures > 15
    assert os.listdir(tmp_path) == ["out"]
    assert torch.equal(tensors_of(output)[STACKED], make_weights(100)[STACKED])


def test_what_a_killed_export_left_is_removed(original: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.incomplete" / "tokenizer").mkdir(parents=True)
    export_weights(original / "checkpoints" / "step_00000100", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_the_small_files(original: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Commands succeed or report the problem; they do not crash."""
    directory = tmp_path / "run"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(original, directory)
    name = data.draw(st.sampled_from(["state.json", "manifest.json", "../latest"]))
    # For the other commands, `latest` decides which checkpoint is used.
    actions = ["list"] if name == "../latest" else ["list", "inspect", "verify"]
    state = json.dumps(
        summary_of(
            100,
            **data.draw(
                st.dictionaries(
                    st.sampled_from(["kind", "metrics", "train_state", "run", "saved_at", "phase", "model", "layout"]),
                    st.one_of(
                        st.none(), st.integers(), st.text(max_size=3), st.dictionaries(st.text(max_size=2), st.none())
                    ),
                    max_size=3,
                )
            ),
        )
    ).encode()
    content = data.draw(st.one_of(st.binary(max_size=40), st.just(state), st.just(b"{}")))
    (directory / "checkpoints" / "step_00000100" / name).write_bytes(content)
    for action in actions:
        assert main(["checkpoint", action, str(directory)]) in (0, 1, 2)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (3e13, "30.0 TB")]
)
def test_readable_sizes(count: float, text: str) -> None:
    assert readable_bytes(int(count)) == text


def test_files_that_are_removed_meanwhile_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "stays").write_bytes(b"12345")
    removed = [tmp_path / "one", tmp_path / "other"]
    for file in removed:
        file.write_bytes(b"123")
    stat = os.stat

    def stat_and_remove(path: Any, **options: Any) -> Any:
        result = stat(path, **options)
        if Path(path) in removed:
            for file in removed:
                file.unlink()
        return result

    monkeypatch.setattr(os, "stat", stat_and_remove)
    # The first one was counted.
    assert directory_bytes(tmp_path) == 8
