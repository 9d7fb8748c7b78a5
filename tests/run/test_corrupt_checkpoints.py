"""One flipped bit in any file of a checkpoint: every command that reads weights refuses it, with default options."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import assert_facts, user_error
from support.tiny import Tiny, recipe_of
from support.whole_runs import run
from support.workers import WorkerPool

from megatron_prealign.checkpoint.commands.export import export_weights
from megatron_prealign.checkpoint.directory import resolve_checkpoint
from megatron_prealign.conversion.to_hf import ConvertSettings, to_huggingface
from megatron_prealign.conversion.verify import verify
from megatron_prealign.errors import UserError
from megatron_prealign.generation.load import load_model

READERS: dict[str, Callable[[Path, Path], object]] = {
    "convert to-hf": lambda checkpoint, out: to_huggingface(checkpoint, out, ConvertSettings(), show_progress=False),
    "convert verify": lambda checkpoint, out: verify(checkpoint, out, show_progress=False),
    "checkpoint export-weights": lambda checkpoint, out: export_weights(checkpoint, out),
    "generate": lambda checkpoint, out: load_model(checkpoint, torch.device("cpu")),
}


@pytest.fixture(scope="module")
def values(tiny: Tiny, workers: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Recipe of a finished run."""
    values = tiny.values(tmp_path_factory.mktemp("corrupt") / "run")
    values["alignment"] = None
    values["training"].update(train_iters=1, eval_samples=4, retrieval_words=10)
    values["optimizer"]["lr_warmup_iters"] = 0
    values["checkpoint"] = {"on_damage": "fail"}
    run(workers, 1, values, Path(values["logging"]["run_dir"]).parent)
    return values


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def files_of(checkpoint: Path) -> list[str]:
    return sorted(str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file())


@pytest.mark.parametrize("reader", READERS)
def test_readers_in_one_process(reader: str, values: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(resolve_checkpoint(values["logging"]["run_dir"]), tmp_path / "step_00000001"))
    names = files_of(checkpoint)
    assert {"state.json", "manifest.json", ".metadata", "tokenizer/tokenizer.json"} < set(names)
    for name in names:
        flip_bit(checkpoint / name)
        with user_error(checkpoint, *([name] if name != "manifest.json" else [])):
            READERS[reader](checkpoint, tmp_path / "out")
        flip_bit(checkpoint / name)
    assert not (tmp_path / "out").exists()


def refusals(values: dict[str, Any], directory: str, weights: str) -> list[str]:
    """Runs in a worker: messages of `evaluate` and of a resumed run."""
    from megatron_prealign.recipe import ParallelSection
    from megatron_prealign.run.evaluate import evaluate_runs
    from megatron_prealign.run.pretrain import pretrain

    def resume() -> None:
        pretrain(recipe_of(values, Path(directory)), leave_process_group=True)

    def evaluate() -> None:
        runs = {"a": Path(values["logging"]["run_dir"])}
        evaluate_runs(runs, Path(directory) / "report", ParallelSection(device="cpu"), leave_process_group=True)

    messages = []
    flip_bit(Path(weights))
    for read in (evaluate, resume):
        try:
            read()
        except UserError as error:
            messages.append(str(error))
    flip_bit(Path(weights))
    return messages


def test_evaluate_and_resume(values: dict[str, Any], workers: WorkerPool, tmp_path: Path) -> None:
    checkpoint = resolve_checkpoint(values["logging"]["run_dir"])
    weights = max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)
    values = {**values, "training": {**values["training"], "train_iters": 2}}
    (messages,) = workers.run(1, refusals, values, str(tmp_path), str(weights))
    assert len(messages) == 2
    for message in messages:
        assert_facts(message, checkpoint, weights.name)
