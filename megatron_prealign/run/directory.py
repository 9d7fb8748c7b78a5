"""Run directory: locking, and the files written there before training."""

import json
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megatron_prealign import __version__
from megatron_prealign.alignment.dropped_words import report_dropped_words
from megatron_prealign.checkpoint.commit import RECIPE_FILE
from megatron_prealign.checkpoint.retention import remove_unfinished
from megatron_prealign.errors import write_error
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.files.lock import locked_directories
from megatron_prealign.recipe import Recipe, save_recipe
from megatron_prealign.run.output_paths import (
    VERSIONS_FILE,
    check_directories_writable,
    check_foreign_files,
    run_directories,
)
from megatron_prealign.training.word_steps import WordSteps


def lock_run_directory(recipe: Recipe, locks: ExitStack) -> None:
    """Locks the run's directories until `locks` is closed, and checks them (`output_paths.check_output_paths`).

    Also removes what an interrupted save left behind, since it may be what fills the disk.

    Raises:
        UserError: Another run uses the directories, they are not writable or contain files of the user.
    """
    check_foreign_files(recipe)
    with _write_errors(Path(recipe.logging.run_dir)):
        locks.enter_context(locked_directories([Path(recipe.logging.run_dir), recipe.checkpoint_dir]))
        remove_unfinished(recipe.checkpoint_dir)
    check_directories_writable(recipe)


def record_run(recipe: Recipe, words: WordSteps | None) -> None:
    """Creates the run's directories and writes recipe.yaml, versions.json and the list of dropped alignment words.

    Raises:
        UserError: The directories are not writable.
    """
    run_dir = Path(recipe.logging.run_dir)
    with _write_errors(run_dir):
        for _, directory in run_directories(recipe):
            directory.mkdir(parents=True, exist_ok=True)
        with write_atomically(run_dir / RECIPE_FILE) as path:
            save_recipe(recipe, path)
        with write_atomically(run_dir / VERSIONS_FILE) as path:
            path.write_text(json.dumps(versions(), indent=2), encoding="utf-8")
        if words is not None and recipe.alignment is not None:
            report_dropped_words(words.sampler, recipe.alignment.max_word_tokens, run_dir)


@contextmanager
def _write_errors(run_dir: Path) -> Iterator[None]:
    """Converts operating system errors in the block to a UserError about `run_dir`."""
    try:
        yield
    except OSError as error:
        raise write_error(f"logging.run_dir {run_dir}", error.errno) from error


def versions() -> dict[str, str]:
    """Versions of this package and its dependencies, and the machine."""
    result = {"megatron-prealign": __version__, "python": platform.python_version(), "machine": platform.platform()}
    for name in ("torch", "megatron-core", "triton", "transformers", "tokenizers", "sentencepiece"):
        try:
            result[name] = version(name)
        except PackageNotFoundError:
            result[name] = "not installed"
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
    return result
