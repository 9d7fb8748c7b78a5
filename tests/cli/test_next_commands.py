"""Every command ends with what it made and the next command, which the real parser accepts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts
from support.next_commands import assert_next_commands_parse, next_commands
from support.tiny import Tiny, recipe_of

from megatron_prealign import cli
from megatron_prealign.checkpoint.manifest import write_manifest
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.recipe import Recipe
from megatron_prealign.run.outcome import outcome

# Must be quoted in a shell.
DIRECTORY = "it's data"


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command; returns the line before its suggestions, and the suggested commands."""

    def run(*words: object) -> tuple[str, list[list[str]]]:
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == 0
        output = capsys.readouterr().out
        commands = assert_next_commands_parse(output, monkeypatch)
        capsys.readouterr()
        return output.splitlines()[-1 - len(commands)], commands

    return run


def test_from_text_to_a_checked_recipe(run_command: Any, tiny: Tiny, tmp_path: Path) -> None:
    """Follows the suggestions; what they cannot know (a word list, a recipe) is added."""
    data = tmp_path / DIRECTORY
    data.mkdir()
    text = data / "en.jsonl"
    text.write_text("".join(json.dumps({"text": "the cat and the dog " * 20}) + "\n" for _ in range(30)))
    made, commands = run_command(
        *("train-tokenizer", "--input", f"{text}:en", "--output", data / "tokenizer", "--vocab-size", 268)
    )
    assert_facts(made, data / "tokenizer", "268 ids", "1 language")
    (preprocess,) = commands
    made, (inspect,) = run_command(*preprocess)
    assert_facts(made, data / "en", "30 documents", "tokens")
    _, (verify,) = run_command(*inspect)
    made, _ = run_command(*verify)
    assert_facts(made, "1 dataset ")

    words = data / "words.tsv"
    words.write_text("cat\tKatze\ndog\tHund\n", encoding="utf-8")
    build = ["dictionary", "build", "--input", f"{words}:en-de", "--tokenizer", data / "tokenizer"]
    made, _ = run_command(*build, "--output", data / "without.safetensors")
    assert_facts(made, data / "without.safetensors", "8 keys")
    table = data / "table.safetensors"
    made, (report,) = run_command(*build, "--output", table, "--corpus", data / "en")
    made, (preview,) = run_command(*report)
    assert_facts(made, "report.json", "1 dataset")
    assert cli.main([*preview, "--seq-length", "16"]) == 0
    _, commands = run_command("dictionary", "coverage", "--table", table, "--corpus", data / "en")
    assert commands == [report]

    for extension in (".bin", ".idx", ".json"):
        shutil.copy(f"{data / 'en'}{extension}", f"{data / 'copy'}{extension}")
    made, (verify,) = run_command(
        *("dataset", "merge", "--input", data / "en", data / "copy", "--output", data / "both")
    )
    assert_facts(made, "2 datasets", data / "both", "60 documents")
    run_command(*verify)
    made, _ = run_command("dataset", "repair", data / "both", "--force")
    assert_facts(made, data / "both", "60 documents")
    _, commands = run_command("dictionary", "merge", "--table", table, table, *build[-2:], "--output", data / "2.st")
    assert commands == [["dictionary", "report", "--help"]]


def test_a_damaged_dataset_is_to_be_repaired(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / DIRECTORY
    for extension in (".bin", ".idx", ".json"):
        shutil.copy(f"{tiny.directory}/en{extension}", f"{prefix}{extension}")
    values = json.loads(Path(f"{prefix}.json").read_text())
    Path(f"{prefix}.json").write_text(json.dumps({**values, "bytes": 1, "documents": 1}))
    assert cli.main(["dataset", "verify", str(prefix)]) == 1
    assert assert_next_commands_parse(capsys.readouterr().out, monkeypatch) == [["dataset", "repair", str(prefix)]]


def test_a_valid_recipe_is_to_be_trained(run_command: Any, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / f"{DIRECTORY}.json"
    recipe.write_text(json.dumps(tiny.values(tmp_path / "run")))
    options = ["--config", str(recipe), "--training.eval_samples", "4", "--parallel.sequence_parallel=false"]
    _, (train,) = run_command("pretrain", *options, "--validate", "--world-size", "2")
    assert train[:3] == ["pretrain", "--config", str(recipe)]
    assert train[3:] == ["--training.eval-samples", "4", "--parallel.sequence-parallel=false"]
    made, (preview,) = run_command("dictionary", "preview", "--config", recipe, "--rows", "2")
    assert_facts(made, "2 samples")
    assert preview == ["pretrain", "--config", str(recipe), "--validate"]


@pytest.mark.parametrize(
    ("options", "processes"),
    [([], 1), (["--world-size", "2"], 2), (["--parallel.tensor-model-parallel-size", "2"], 2)],
)
def test_the_command_to_train_starts_the_processes_of_the_layout(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], processes: int
) -> None:
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny.values(tmp_path / "run")))
    assert cli.main(["pretrain", "--config", str(recipe), *options, "--validate"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert ("torchrun" in last) == (processes > 1) and (f"--nproc-per-node {processes} " in last) == (processes > 1)


def finished_run(tiny: Tiny, run_dir: Path, **checkpoint: Any) -> Recipe:
    """Recipe of a run that wrote a checkpoint and metrics."""
    values = tiny.values(run_dir)
    values["checkpoint"] = checkpoint
    recipe = recipe_of(values, run_dir)
    saved = recipe.checkpoint_dir / "step_00000009"
    saved.mkdir(parents=True)
    write_manifest(saved, {})
    (recipe.checkpoint_dir / "latest").write_text(saved.name)
    lines = [
        {"kind": "evaluation", "validation_loss": {"en": 9.0}},
        {"kind": "train", "loss": 8.0},
        {"kind": "evaluation", "validation_loss": {"en": 1.25, "de": 2.5}},
        {"kind": "train", "loss": 1.75},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return recipe


def test_a_finished_run(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / f"{DIRECTORY}=1"
    recipe = finished_run(tiny, directory)
    state = TrainState(step=9, tokens=1234)
    text = outcome(recipe, state, rerun="megatron-prealign pretrain")
    assert_facts(text, "9 steps", "1,234 tokens", "loss 1.7500", "en 1.2500, de 2.5000", "checkpoints/step_00000009")
    evaluate, generate, convert = assert_next_commands_parse(text, monkeypatch)
    assert evaluate[:3] == ["evaluate", "--run", f"it's data_1={directory}"]
    assert generate[:3] == ["generate", "--checkpoint", str(directory / "checkpoints")]
    assert convert[:4] == ["convert", "to-hf", "--checkpoint", str(directory / "checkpoints")]

    state.stop_requested = True
    text = outcome(recipe, state, rerun="megatron-prealign pretrain --config recipe.yaml")
    assert assert_next_commands_parse(text, monkeypatch) == [["pretrain", "--config", "recipe.yaml"]]
    assert next_commands(outcome(recipe, state, rerun=None)) == []


@pytest.mark.parametrize(
    "line", [None, {"kind": "train"}, {"kind": "train", "loss": None}, {"kind": "evaluation", "validation_loss": [1]}]
)
def test_a_finished_run_whose_losses_cannot_be_read(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture, line: dict[str, Any] | None
) -> None:
    recipe = finished_run(tiny, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.unlink()
    if line is None:
        metrics.mkdir()
    else:
        metrics.write_text(json.dumps({"kind": "train", "loss": 1.0}) + "\n" + json.dumps(line) + "\n")
    text = outcome(recipe, TrainState(step=9), rerun=None)
    assert_facts(text, "9 steps", "checkpoints/step_00000009")
    assert "training loss" not in text and "validation loss" not in text
    (message,) = caplog.messages
    assert_facts(message, "WARNING", metrics)


def test_a_finished_run_with_its_checkpoints_in_another_place(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate` takes a run directory with its checkpoints."""
    recipe = finished_run(tiny, tmp_path / "run", directory=str(tmp_path / "elsewhere"))
    _, convert = assert_next_commands_parse(outcome(recipe, TrainState(step=9), rerun=None), monkeypatch)
    assert convert[:4] == ["convert", "to-hf", "--checkpoint", str(tmp_path / "elsewhere")]
