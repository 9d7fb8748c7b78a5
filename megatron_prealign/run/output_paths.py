"""Checks the directories that a run writes to: before training and in `pretrain --validate`. Imports no torch.

A run replaces files in its run directory and its checkpoint directory. It must not replace the user's, so each existing
file with such a name has to be one that a run wrote.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from megatron_prealign.checkpoint.commit import RECIPE_FILE
from megatron_prealign.checkpoint.directory import LATEST, named_latest, step_directories
from megatron_prealign.errors import UserError
from megatron_prealign.files.directories import check_writable
from megatron_prealign.files.yaml_text import YamlError, dump_yaml, load_yaml, read_utf8
from megatron_prealign.recipe import Recipe
from megatron_prealign.training.metrics_file import METRICS_FILE

VERSIONS_FILE = "versions.json"
PROFILE_DIRECTORY = "profile"
"""Name in the run directory."""
# Sections that every saved recipe has; a user's recipe leaves out those with defaults only.
_SAVED_SECTIONS = {"model", "data", "optimizer", "training", "logging", "parallel", "checkpoint"}
# A run that was killed may have written less.
_METRICS_START = b'{"kind": '


def check_output_paths(recipe: Recipe) -> None:
    """Checks that the run can write to its directories, and that it would not replace files of the user.

    Leaves nothing behind, because the run may still be rejected.

    Raises:
        UserError: a path is empty, a file or not writable, or a file in it was not written by a run.
    """
    check_foreign_files(recipe)
    check_directories_writable(recipe)


def check_directories_writable(recipe: Recipe) -> None:
    """Checks that files can be created in the run's directories.

    Raises:
        UserError: one is a file, below a file or not writable.
    """
    for field, directory in _directories(recipe):
        try:
            check_writable(directory, f"{field} {directory}")
        except UserError as error:
            # Only some of the errors name the field.
            raise error if field in str(error) else UserError(f"{field}: {error}") from error


def check_foreign_files(recipe: Recipe) -> None:
    """Checks that the run would replace no file that a run did not write. Only reads.

    Raises:
        UserError: it would; or a path is empty or contains a `~`, which only shells expand.
    """
    for field, path in _fields(recipe):
        if not path.strip() or path.startswith("~"):
            reason = "only shells expand ~" if path.strip() else "it is empty"
            raise UserError(f"{field} is {path!r}, expected the path of a directory ({reason})")
    run_dir = Path(recipe.logging.run_dir)
    for name, is_of_run in _REPLACED.items():
        file = run_dir / name
        if os.path.exists(file) and not is_of_run(file):
            raise UserError(
                f"logging.run_dir {run_dir} contains {name}, which no run wrote and which this run would overwrite; "
                "set logging.run_dir to a new directory"
            )
    latest = recipe.checkpoint_dir / LATEST
    if os.path.exists(latest) and not step_directories(latest.parent) and named_latest(latest.parent) is None:
        raise UserError(
            f"checkpoint.directory {latest.parent} contains {LATEST}, which no run wrote and which this run would "
            "overwrite; set checkpoint.directory to a new directory"
        )


def _fields(recipe: Recipe) -> list[tuple[str, str]]:
    """The fields that are set, and their paths."""
    fields = [
        ("logging.run_dir", recipe.logging.run_dir),
        ("checkpoint.directory", recipe.checkpoint.directory),
        ("data.cache", recipe.data.cache),
    ]
    return [(field, path) for field, path in fields if path is not None]


def run_directories(recipe: Recipe) -> list[tuple[str, Path]]:
    """All directories that training writes to but the cache, each after the field that names it or its parent."""
    run_dir, section = Path(recipe.logging.run_dir), recipe.logging
    inside = {
        "tensorboard": section.tensorboard,
        "wandb": section.wandb,
        PROFILE_DIRECTORY: section.profile_steps is not None,
    }
    checkpoints = "logging.run_dir" if recipe.checkpoint.directory is None else "checkpoint.directory"
    return [
        ("logging.run_dir", run_dir),
        (checkpoints, recipe.checkpoint_dir),
        *(("logging.run_dir", run_dir / name) for name, used in inside.items() if used),
    ]


def _directories(recipe: Recipe) -> list[tuple[str, Path]]:
    # A prepared sample index may be on a read-only disk.
    prepared = os.path.isdir(recipe.cache_dir) and any(recipe.cache_dir.glob("blend-*"))
    field = "logging.run_dir" if recipe.data.cache is None else "data.cache"
    return [*run_directories(recipe), *([] if prepared else [(field, recipe.cache_dir)])]


def _is_saved_recipe(file: Path) -> bool:
    """Whether a file has all sections and the layout of `save_recipe`, so that no comments are lost."""
    try:
        text = read_utf8(file)
        values = load_yaml(text)
    except (OSError, YamlError):
        return False
    return isinstance(values, dict) and values.keys() >= _SAVED_SECTIONS and dump_yaml(values) == text


def _is_versions(file: Path) -> bool:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "megatron-prealign" in values


def _is_metrics(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            start = content.read(len(_METRICS_START))
    except OSError:
        return False
    return _METRICS_START.startswith(start)


_REPLACED: dict[str, Callable[[Path], bool]] = {
    RECIPE_FILE: _is_saved_recipe,
    VERSIONS_FILE: _is_versions,
    METRICS_FILE: _is_metrics,
}
"""File in the run directory -> whether a run wrote it."""
