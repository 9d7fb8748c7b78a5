"""Helpers for tests of complete runs: train a recipe on a number of processes, read its losses and weights."""

import copy
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prealign.checkpoint.manifest import MANIFEST, write_manifest
from support.tiny import Tiny, recipe_of
from support.workers import WorkerError, WorkerPool


def train(values: dict[str, Any], directory: str) -> dict[str, Any]:
    """Runs in a worker: trains the recipe; returns the final counters."""
    from megatron_prealign.run.pretrain import pretrain

    return pretrain(recipe_of(values, Path(directory)), leave_process_group=True).to_dict()


@contextmanager
def logged_lines() -> Iterator[list[str]]:
    """Yields the messages that the package logs in the block, in any process."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("megatron_prealign")
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def train_logged(values: dict[str, Any], directory: str) -> list[str]:
    """Runs in a worker: trains the recipe; returns the log lines of the package."""
    with logged_lines() as lines:
        train(values, directory)
    return lines


def read_weights(checkpoint: str, vocab_size: int) -> dict[str, torch.Tensor]:
    """Runs in one worker: full tensors of a checkpoint saved in any layout, without padding rows of the vocabulary."""
    from megatron.core import dist_checkpointing

    from megatron_prealign.runtime import cpu

    cpu.enable()
    tensors = dist_checkpointing.load_plain_tensors(checkpoint)
    return {
        name: tensor[:vocab_size] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else tensor
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor) and not name.startswith("optimizer")
    }


def run(workers: WorkerPool, world_size: int, values: dict[str, Any], directory: Path) -> None:
    """Trains on `world_size` processes; the run's files are in the recipe's run_dir."""
    workers.run(world_size, train, values, str(directory))


def records(run_dir: Path, kind: str = "train") -> dict[tuple[str, int], dict[str, Any]]:
    """(phase, step) -> the last matching line of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {(line["phase"], line["step"]): line for line in lines if line["kind"] == kind}


def weights(workers: WorkerPool, run_dir: Path, vocab_size: int, name: str | None = None) -> dict[str, torch.Tensor]:
    """Weights of the run's newest checkpoint, or of the one named `name`."""
    name = name or (run_dir / "checkpoints" / "latest").read_text().strip()
    return workers.run(1, read_weights, str(run_dir / "checkpoints" / name), vocab_size)[0]


def reseal(checkpoint: Path) -> None:
    """Rewrites the manifest after a test changed files, as if they had been saved that way."""
    (checkpoint / MANIFEST).unlink()
    write_manifest(checkpoint, {})


def everything_in(checkpoint: str) -> dict[str, torch.Tensor]:
    """Runs in a worker: all tensors of a checkpoint, including the optimizer's."""
    from megatron.core import dist_checkpointing

    from megatron_prealign.runtime import cpu

    cpu.enable()
    tensors = dist_checkpointing.load_plain_tensors(checkpoint)
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def language_model_values(tiny: Tiny, run_dir: Path, **checkpoint: Any) -> dict[str, Any]:
    """Recipe values of language-model training only, five steps."""
    values = copy.deepcopy(tiny.values(run_dir))
    del values["alignment"]
    values["parallel"] = {"device": "cpu"}
    values["training"]["eval_samples"] = 2
    values["checkpoint"] = checkpoint
    return values


def steps_in(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def user_error_message(caught: pytest.ExceptionInfo[WorkerError]) -> str:
    """Message of the UserError that all ranks raise."""
    kinds = {kind for kind, _, _ in caught.value.failures.values()}
    messages = {message for _, message, _ in caught.value.failures.values()}
    assert kinds == {"UserError"}, caught.value
    assert len(messages) == 1
    return messages.pop()


def refusal(workers: WorkerPool, function: Callable[..., Any], *arguments: Any) -> str:
    """Runs `function` on two ranks; returns the one-line message of the UserError that both raise."""
    with pytest.raises(WorkerError) as caught:
        workers.run(2, function, *arguments)
    failures = {(kind, message) for kind, message, _ in caught.value.failures.values()}
    assert set(caught.value.failures) == {0, 1}
    assert len(failures) == 1, caught.value
    kind, message = failures.pop()
    assert kind == "UserError", caught.value
    assert "\n" not in message
    return message
