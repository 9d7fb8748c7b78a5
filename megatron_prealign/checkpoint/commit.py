"""Turns a directory of sharded tensors into a checkpoint: writes the other files and the manifest, then renames it."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.directory import point_latest
from megatron_prealign.checkpoint.manifest import FileRecord, write_manifest
from megatron_prealign.checkpoint.retention import prune, remove_unfinished
from megatron_prealign.checkpoint.state import write_state
from megatron_prealign.files.sync import sync_directory, sync_tree
from megatron_prealign.files.yaml_text import dump_yaml
from megatron_prealign.recipe import Recipe, save_recipe

RECIPE_FILE = "recipe.yaml"
MODEL_FILE = "model.yaml"
TOKENIZER = "tokenizer"
CONFIG = "huggingface/config.json"
# The directory of a tokenizer may also contain model weights, which are not copied.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "clone.json",
    "chat_template*",
)


@dataclass(frozen=True)
class RunFiles:
    """Content of a run's checkpoint besides its sharded state."""

    recipe: Recipe
    state: Mapping[str, Any]
    """`state.run_state`."""
    huggingface: Mapping[str, Any]
    """Hugging Face config.json of the model."""


def write_run_files(directory: Path, files: RunFiles) -> None:
    """Writes and syncs all files of a run's checkpoint except its sharded state and the manifest.

    Raises:
        OSError: a file cannot be written, or the tokenizer does not exist.
    """
    save_recipe(files.recipe, directory / RECIPE_FILE)
    copy_tokenizer(Path(files.recipe.data.tokenizer), directory / TOKENIZER)
    described = _describe(directory, files.state, files.huggingface)
    for path in (directory / RECIPE_FILE, directory / TOKENIZER, *described):
        sync_tree(path)


def complete_weights(
    directory: Path,
    state: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None,
    records: Mapping[str, FileRecord],
) -> None:
    """Completes a checkpoint of only weights: writes the files besides its tensors and tokenizer, the manifest last.

    Args:
        directory: Directory with the tensors and the directory `tokenizer`.
        state: `state.weights_state`.
        config: Hugging Face config.json of the model; None if there is none.
        records: Records of the files with the tensors.

    Raises:
        OSError: a file cannot be written.
    """
    _describe(directory, state, config)
    write_manifest(directory, records)


def _describe(directory: Path, state: Mapping[str, Any], config: Mapping[str, Any] | None) -> list[Path]:
    """Writes `model.yaml` (the recipe's section `model`), config.json and, last, `state.json`; returns their paths."""
    model = directory / MODEL_FILE
    model.write_text(dump_yaml({"model": state["model"]}), encoding="utf-8")
    written = [model]
    if config is not None:
        path = directory / CONFIG
        path.parent.mkdir()
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(path.parent)
    return [*written, write_state(directory, state)]


def commit(working: Path, final: Path, records: Mapping[str, FileRecord]) -> None:
    """Writes the manifest of `working`, renames it to `final` and points `latest` at it.

    If the process is killed between any two steps, the checkpoint that `latest` names is intact.

    Args:
        records: Records of files that need not be read again.

    Raises:
        OSError: a file cannot be written.
        UserError: a file cannot be read.
    """
    write_manifest(working, records)
    sync_directory(working)
    directory = final.parent
    if final.exists():
        # A run that was resumed from an older checkpoint reaches this step again.
        os.replace(final, directory / f".{final.name}.abandoned.incomplete")
    os.replace(working, final)
    sync_directory(directory)
    point_latest(directory, final.name)


def remove_obsolete(final: Path, recipe: Recipe) -> None:
    """Removes unfinished saves and old checkpoints after a save; logs a warning for what cannot be removed."""
    remove_unfinished(final.parent)
    prune(final.parent, final, recipe.checkpoint)


def tokenizer_files(source: Path) -> list[Path]:
    """Files of the tokenizer `source` that a checkpoint contains."""
    if not source.is_dir():
        return [source]
    return sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()})


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copies the tokenizer's files into the new directory `target`; returns the copies."""
    files = tokenizer_files(source)
    target.mkdir()
    return [Path(shutil.copy2(file, target / file.name)) for file in files]
