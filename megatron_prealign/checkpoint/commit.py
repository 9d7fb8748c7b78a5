"""Turns a directory that contains sharded tensors into a checkpoint: the files next to them, the manifest, the name."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_prealign.checkpoint.directory import point_latest
from megatron_prealign.checkpoint.manifest import FileRecord, write_manifest
from megatron_prealign.checkpoint.retention import prune, remove_unfinished
from megatron_prealign.checkpoint.state import write_state
from megatron_prealign.files.sync import sync_directory, sync_tree
from megatron_prealign.recipe import Recipe, save_recipe

RECIPE_FILE = "recipe.yaml"
MODEL_FILE = "model.yaml"
TOKENIZER = "tokenizer"
CONFIG = "huggingface/config.json"
# Weights of a model may lie in the same directory: they are no part of the tokenizer.
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
    """What a run's checkpoint contains next to its sharded state."""

    recipe: Recipe
    state: Mapping[str, Any]
    """`state.run_state`."""
    huggingface: Mapping[str, Any]
    """config.json of the model, as Hugging Face has it."""


def write_run_files(directory: Path, files: RunFiles) -> None:
    """Writes and syncs everything of a run's checkpoint but its sharded state and the manifest.

    Raises:
        OSError: the disk refuses, or the tokenizer is gone.
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
    """Writes what a checkpoint of weights alone contains next to its tensors and its tokenizer, the manifest last.

    Args:
        directory: With the tensors and the directory `tokenizer`.
        state: `state.weights_state`.
        config: config.json of the same model for Hugging Face; None where that cannot be said.
        records: Of the files with the tensors.

    Raises:
        OSError: the disk does not take it.
    """
    _describe(directory, state, config)
    write_manifest(directory, records)


def _describe(directory: Path, state: Mapping[str, Any], config: Mapping[str, Any] | None) -> list[Path]:
    """Writes `model.yaml`, which a recipe can be completed with, config.json and, last, `state.json`; returns what was
    written."""
    model = directory / MODEL_FILE
    model.write_text(yaml.safe_dump({"model": state["model"]}, sort_keys=False, allow_unicode=True), encoding="utf-8")
    written = [model]
    if config is not None:
        path = directory / CONFIG
        path.parent.mkdir()
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        written.append(path.parent)
    return [*written, write_state(directory, state)]


def commit(working: Path, final: Path, records: Mapping[str, FileRecord]) -> None:
    """Writes the manifest of `working`, gives it its final name and points `latest` at it. A kill between any two
    steps leaves the checkpoint that `latest` names.

    Args:
        records: of files that need not be read again.

    Raises:
        OSError: the disk refuses.
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


def tidy(final: Path, recipe: Recipe) -> None:
    """Removes what a checkpoint that was just completed makes superfluous. What cannot be removed is a warning."""
    remove_unfinished(final.parent)
    prune(final.parent, final, recipe.checkpoint)


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copies the tokenizer's own files into the new directory `target`; returns the copies."""
    if source.is_dir():
        files = sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()})
    else:
        files = [source]
    target.mkdir()
    return [Path(shutil.copy2(file, target / file.name)) for file in files]
