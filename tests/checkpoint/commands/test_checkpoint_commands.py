"""`checkpoint list | inspect | verify | export-weights`: what they say, what they find, and that they need no GPU."""

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

from megatron_prealign.checkpoint.commands.export import export_weights
from megatron_prealign.checkpoint.commands.list import directory_bytes, list_checkpoints, readable_bytes
from megatron_prealign.checkpoint.manifest import find_damage, read_manifest
from megatron_prealign.checkpoint.single_process.reader import ShardReader
from megatron_prealign.checkpoint.state import read_state
from megatron_prealign.cli import main
from megatron_prealign.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with three checkpoints; tests that change something copy it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    make_run(run_dir, [10, 20, 100])
    return run_dir


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    status = main(["checkpoint", *map(str, argv)])
    captured = capsys.readouterr()
    return status, captured.out + (captured.err if status == 2 else "")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    with ShardReader(directory) as reader:
        return {key: reader.read(key) for key in reader.tensors}


@pytest.mark.parametrize("inner", ["", "checkpoints"])
def test_a_list_says_what_there_is(whole: Path, inner: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = printed(capsys, "list", whole / inner)
    lines = [line.split() for line in text.splitlines()]
    assert status == 0 and len(lines) == 4
    assert [line[0] for line in lines[1:]] == ["step_00000010", "step_00000020", "step_00000100"]
    assert [("*" in line) for line in lines[1:]] == [False, False, True]
    assert "complete" in lines[1] and "language_model" in lines[1] and "10,000" in lines[1] and "4.9" in lines[1]


def test_a_list_names_damage(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert listed["step_00000020"].status == listed["step_00000030.damaged"].status == "damaged"
    assert len(listed["step_00000020"].problems) == 2
    assert listed["step_00000100"].status == "damaged" and listed["step_00000100"].step == 100
    assert listed[".step_00000110.incomplete"].status == "incomplete"
    assert (listed["base"].status, listed["base"].kind) == ("complete", "weights")
    _, text = printed(capsys, "list", run_dir)
    assert "common.pt is missing" in text and "recipe.yaml has 18 bytes, expected 10" in text
    assert f"warning: {directory / 'latest'} names 'step_00000100', which is no checkpoint there" in text


def test_a_list_as_json_and_of_one(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = printed(capsys, "list", "--path", whole / "checkpoints" / "step_00000100", "--json")
    (one,) = json.loads(text)
    assert status == 0
    assert one["status"] == "complete" and one["latest"] and one["step"] == 100 and one["tokens"] == 100_000
    assert one["metrics"] == {"validation_loss/en": 4.0}
    assert one["bytes"] == sum(
        f.stat().st_size for f in (whole / "checkpoints" / one["name"]).rglob("*") if f.is_file()
    )


def test_the_directory_one_stands_in(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(whole)
    assert "step_00000100 *" in printed(capsys, "list", ".")[1]
    monkeypatch.chdir(whole / "checkpoints" / "step_00000100")
    assert "step_00000100 *" in printed(capsys, "list", ".")[1]
    for action in ("inspect", "verify"):
        assert printed(capsys, action, ".")[0] == 0
    status, text = printed(capsys, "export-weights", "--checkpoint", ".", "--output", ".")
    assert status == 2 and "the checkpoint itself" in text
    monkeypatch.chdir(whole)
    status, text = printed(capsys, "export-weights", "--checkpoint", ".", "--output", ".", "--overwrite")
    assert status == 2 and "cannot name a new directory" in text


def test_a_directory_without_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    for action in ("list", "inspect", "verify"):
        status, text = printed(capsys, action, tmp_path)
        assert status == 2 and str(tmp_path) in text and "\n" not in text.strip()
        assert printed(capsys, action, tmp_path / "none")[0] == 2


def test_listing_imports_no_torch(whole: Path) -> None:
    code = "import sys; from megatron_prealign.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    argv = [sys.executable, "-c", code, "checkpoint", "list", str(whole)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "step_00000100 *" in done.stdout, done.stderr


def test_inspect_tells_model_and_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = printed(capsys, "inspect", whole)
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
    assert f"optimizer.state.exp_avg.{STACKED}" in printed(capsys, "inspect", whole, "--tensors")[1]


def test_inspect_as_json(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(printed(capsys, "inspect", whole, "--json")[1])
    assert facts["tensors"][STACKED] == {"shape": [2, 4, 6], "dtype": "float32", "bytes": 192}
    assert facts["weights"] == {"tensors": 4, "bytes": (2 * 8 * 4 + 48 + 4) * 4, "dtype": "float32"}
    assert facts["beside_the_weights"]["tensors"] == 5
    assert facts["run"]["seed"] == 7 and facts["problems"] == [] and facts["kind"] == "run"


def test_inspect_of_a_damaged_one(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints" / "step_00000100"
    (directory / "recipe.yaml").unlink()
    assert "wrong: recipe.yaml is missing" in printed(capsys, "inspect", run_dir)[1]
    (directory / ".metadata").write_bytes(b"")
    status, text = printed(capsys, "inspect", run_dir)
    assert status == 2 and ".metadata" in text


def test_verify_reads_everything(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints"
    status, text = printed(capsys, "verify", run_dir)
    assert status == 0 and "step_00000100: 9 files" in text and "step_00000020" not in text
    flip_a_byte(directory / "step_00000020" / "__1_0.distcp")
    (directory / "step_00000020" / "tokenizer" / "tokenizer.json").unlink()
    (directory / "step_00000100" / "notes.txt").write_text("mine", encoding="utf-8")
    status, text = printed(capsys, "verify", run_dir, "--all", "--workers", 2)
    assert status == 1
    assert "step_00000020: __1_0.distcp has another checksum" in text
    assert "step_00000020: tokenizer/tokenizer.json is missing" in text
    assert "step_00000100: notes.txt is not in the manifest" in text
    assert "1 of 3 checkpoints is damaged" in text
    assert printed(capsys, "verify", directory / "step_00000100")[0] == 0
    assert printed(capsys, "verify", directory / "step_00000020")[0] == 1


def test_verify_without_a_manifest_or_a_state(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints" / "step_00000100"
    (directory / "state.json").unlink()
    status, text = printed(capsys, "verify", directory)
    assert status == 1 and "state.json is missing" in text
    (run_dir / "checkpoints" / "step_00000020" / "manifest.json").unlink()
    status, text = printed(capsys, "verify", run_dir / "checkpoints" / "step_00000020")
    assert status == 1 and "never completed" in text


def test_verify_looks_at_what_latest_names(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not at an older one that happens to be whole."""
    directory = run_dir / "checkpoints"
    (directory / "step_00000100" / "manifest.json").unlink()
    for path in (run_dir, directory):
        status, text = printed(capsys, "verify", path)
        assert status == 1 and "damaged:" in text and "step_00000100" in text and "step_00000020" not in text
    shutil.rmtree(directory / "step_00000100")
    for flags in ([], ["--all"]):
        status, text = printed(capsys, "verify", run_dir, *flags)
        assert status == 1 and f"damaged: {directory / 'latest'} names step_00000100, which is missing" in text
        assert "step_00000020: 9 files" in text
    for step in (10, 20):
        shutil.rmtree(directory / f"step_{step:08}")
    status, text = printed(capsys, "verify", run_dir)
    assert status == 1 and "which is missing" in text


def test_verify_finds_a_state_that_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest is right: whoever wrote the directory wrote nonsense."""
    directory = make_checkpoint(tmp_path / "step_00000001", 1, layout=3)
    status, text = printed(capsys, "verify", directory)
    assert status == 1 and "state.json is damaged (layout is 3, expected dict)" in text


def test_what_was_put_aside_is_not_verified_with_all(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints"
    os.replace(directory / "step_00000010", directory / "step_00000010.damaged")
    flip_a_byte(directory / "step_00000010.damaged" / "__0_0.distcp")
    status, text = printed(capsys, "verify", run_dir, "--all")
    assert status == 0 and "0 of 2 checkpoints are damaged" in text


def test_the_weights_alone(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "weights"
    status, text = printed(capsys, "export-weights", "--checkpoint", whole, "--output", output)
    assert status == 0 and "4 tensors, 116 numbers, float32" in text
    exported, original = tensors_of(output), make_weights(100)
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original)
    summary = read_state(output)
    assert summary["kind"] == "weights" and summary["model"] == summary_of(100)["model"]
    assert summary["vocab_size"] == 6 and summary["padded_vocab_size"] == 8
    assert summary["source"]["step"] == 100 and summary["source"]["metrics"] == {"validation_loss/en": 4.0}
    assert (output / "tokenizer" / "tokenizer.json").exists() and not (output / "recipe.yaml").exists()
    assert find_damage(output, read_manifest(output), checksums=True) == []
    assert os.listdir(tmp_path) == ["weights"]
    # Weights of weights are the same again, and still say where they come from.
    again = tmp_path / "again"
    export_weights(output, again)
    assert read_state(again)["source"] == summary["source"]
    assert all(torch.equal(tensor, original[key]) for key, tensor in tensors_of(again).items())


def test_weights_in_another_type(whole: Path, tmp_path: Path) -> None:
    seen = []
    checkpoint = whole / "checkpoints" / "step_00000100"
    done = export_weights(
        checkpoint, tmp_path / "out", dtype="bf16", progress=lambda now, total: seen.append((now, total))
    )
    assert done.bytes == 2 * done.parameters and done.dtype == "bfloat16"
    for key, tensor in tensors_of(tmp_path / "out").items():
        assert torch.equal(tensor, make_weights(100)[key].bfloat16())
    assert json.loads((tmp_path / "out" / "huggingface" / "config.json").read_bytes())["dtype"] == "bfloat16"
    assert len(seen) == 3 + LAYERS and seen[-1] == (4 * done.parameters, 4 * done.parameters)


def test_what_is_there_stays(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("export-weights", "--checkpoint", whole, "--output")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("all of it", encoding="utf-8")
    for flags in ([], ["--overwrite"]):
        status, text = printed(capsys, *options, mine, *flags)
        assert status == 2 and "something other" in text
    assert os.listdir(mine) == ["thesis.tex"]
    status, text = printed(capsys, *options, mine / "thesis.tex")
    assert status == 2 and "is not a directory" in text
    of_a_run = make_checkpoint(tmp_path / "of_a_run", 4)
    status, text = printed(capsys, *options, of_a_run, "--overwrite")
    assert status == 2 and "something other" in text and (of_a_run / "recipe.yaml").exists()
    older = make_checkpoint(tmp_path / "older", 3, kind="weights")
    status, text = printed(capsys, *options, older)
    assert status == 2 and "--overwrite" in text
    assert torch.equal(tensors_of(older)[STACKED], make_weights(3)[STACKED])
    assert printed(capsys, *options, older, "--overwrite")[0] == 0
    assert torch.equal(tensors_of(older)[STACKED], make_weights(100)[STACKED])
    assert sorted(os.listdir(tmp_path)) == ["mine", "of_a_run", "older"]
    checkpoint = whole / "checkpoints" / "step_00000100"
    with pytest.raises(UserError, match="the checkpoint itself"):
        export_weights(checkpoint, checkpoint, overwrite=True)


def test_a_damaged_checkpoint_is_not_exported(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = run_dir / "checkpoints" / "step_00000100"
    shard = directory / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="__0_0.distcp has"):
        export_weights(directory, tmp_path / "out")
    directory = run_dir / "checkpoints" / "step_00000020"
    flip_a_byte(directory / "__0_0.distcp")
    status, text = printed(capsys, "export-weights", "--checkpoint", directory, "--output", tmp_path / "out")
    assert status == 2 and "__0_0.distcp has another checksum" in text
    assert not (tmp_path / "out").exists()


def test_the_output_is_looked_at_before_the_checkpoint_is_read(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a damaged checkpoint: whoever read it first would say so."""
    directory = run_dir / "checkpoints" / "step_00000020"
    flip_a_byte(directory / "__0_0.distcp")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    options = ("export-weights", "--checkpoint", directory, "--output")
    status, text = printed(capsys, *options, tmp_path / "file")
    assert status == 2 and "is not a directory" in text
    status, text = printed(capsys, *options, tmp_path / "file" / "a" / "b")
    assert status == 2 and f"cannot be a directory: {tmp_path / 'file'} is a file" in text


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 ends a little earlier than float32."""
    from support import checkpoint_directories

    large = {**make_weights(1), "decoder.final_layernorm.weight": torch.full((4,), torch.finfo(torch.float32).max)}
    monkeypatch.setattr(checkpoint_directories, "make_weights", lambda seed: large)
    directory = make_checkpoint(tmp_path / "step_00000001", 1)
    with pytest.raises(UserError, match="decoder.final_layernorm.weight has numbers that are too large"):
        export_weights(directory, tmp_path / "out", dtype="bf16")
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_a_disk_that_refuses_leaves_nothing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call that changes the disk in turn: the old directory or the new one is there, whole."""
    calls = {"count": 0, "fail_at": 0}

    def failing(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls["count"] += 1
            if calls["count"] == calls["fail_at"]:
                raise OSError(28, "No space left on device")
            return real(*args, **options)

        return call

    output = make_checkpoint(tmp_path / "out", 3, kind="weights")
    checkpoint = whole / "checkpoints" / "step_00000100"
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
            there = output if output.exists() else tmp_path / ".out.replaced"
            assert find_damage(there, read_manifest(there), checksums=True) == []
            assert not (tmp_path / ".out.incomplete").exists()
    assert failures > 15
    assert os.listdir(tmp_path) == ["out"]
    assert torch.equal(tensors_of(output)[STACKED], make_weights(100)[STACKED])


def test_what_a_killed_export_left_is_removed(whole: Path, tmp_path: Path) -> None:
    (tmp_path / ".out.incomplete" / "tokenizer").mkdir(parents=True)
    export_weights(whole / "checkpoints" / "step_00000100", tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_in_the_small_files(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Commands say what is wrong or work; they do not fall over."""
    directory = tmp_path / "run"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(whole, directory)
    name = data.draw(st.sampled_from(["state.json", "manifest.json", "../latest"]))
    # What `latest` says decides for the others which checkpoint is meant, if any.
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
def test_sizes_are_readable(count: float, text: str) -> None:
    assert readable_bytes(int(count)) == text


def test_files_that_a_save_takes_away_meanwhile_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "stays").write_bytes(b"12345")
    going = [tmp_path / "one", tmp_path / "other"]
    for file in going:
        file.write_bytes(b"123")
    stat = os.stat

    def go(path: Any, **options: Any) -> Any:
        found = stat(path, **options)
        if Path(path) in going:
            for file in going:
                file.unlink()
        return found

    monkeypatch.setattr(os, "stat", go)
    # The first one was seen.
    assert directory_bytes(tmp_path) == 8
