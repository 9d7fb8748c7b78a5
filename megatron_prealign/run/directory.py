"""The directory of a run: whether it can be written, and what is written there before training."""

import json
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_prealign import __version__
from megatron_prealign.alignment.dropped_words import report_dropped_words
from megatron_prealign.checkpoint.retention import remove_unfinished
from megatron_prealign.errors import write_error
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.files.directories import check_writable
from megatron_prealign.files.lock import locked_directories
from megatron_prealign.recipe import Recipe, save_recipe
from megatron_prealign.training.word_steps import WordSteps


def check_run_directory(recipe: Recipe) -> None:
    """Finds out now and not after the data and the model are there whether the run's directories can be written; leaves
    none behind, for the run may yet be refused.

    Raises:
        UserError: they cannot.
    """
    for directory in _directories(recipe):
        check_writable(directory, f"logging.run_dir {recipe.logging.run_dir}")


def _directories(recipe: Recipe) -> list[Path]:
    run_dir = Path(recipe.logging.run_dir)
    return [run_dir, recipe.checkpoint_dir, *([run_dir / "tensorboard"] if recipe.logging.tensorboard else [])]


def take_run_directory(recipe: Recipe, held: ExitStack) -> None:
    """Keeps other runs out of this run's directories for as long as `held` is open, removes what an interrupted save
    left, which may be what fills the disk, and finds out whether the directories can be written.

    Raises:
        UserError: another run is there, or they cannot be written.
    """
    with _writing_to(Path(recipe.logging.run_dir)):
        held.enter_context(locked_directories([Path(recipe.logging.run_dir), recipe.checkpoint_dir]))
        remove_unfinished(recipe.checkpoint_dir)
    check_run_directory(recipe)


def record_run(recipe: Recipe, words: WordSteps | None) -> None:
    """Makes the run's directories and writes down what runs there.

    Raises:
        UserError: they cannot be written.
    """
    run_dir = Path(recipe.logging.run_dir)
    with _writing_to(run_dir):
        for directory in _directories(recipe):
            directory.mkdir(parents=True, exist_ok=True)
        with write_atomically(run_dir / "recipe.yaml") as path:
            save_recipe(recipe, path)
        with write_atomically(run_dir / "versions.json") as path:
            path.write_text(json.dumps(versions(), indent=2), encoding="utf-8")
        if words is not None and recipe.alignment is not None:
            report_dropped_words(words.sampler, recipe.alignment.max_word_tokens, run_dir)


@contextmanager
def _writing_to(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise write_error(f"logging.run_dir {run_dir}", error.errno) from error


def versions() -> dict[str, str]:
    """Versions of this package and of what it runs on, and the machine."""
    found = {"megatron-prealign": __version__, "python": platform.python_version(), "machine": platform.platform()}
    for name in ("torch", "megatron-core", "triton", "transformers", "tokenizers", "sentencepiece"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
