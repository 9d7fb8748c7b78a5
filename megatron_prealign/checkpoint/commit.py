"""Turns a folder that holds a run's sharded state into a checkpoint: the files beside it, the manifest, the name."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_prealign.checkpoint.folder import STATE, point_latest
from megatron_prealign.checkpoint.manifest import FileRecord, write_manifest
from megatron_prealign.checkpoint.retention import prune, remove_unfinished
from megatron_prealign.files.sync import sync_directory, sync_file
from megatron_prealign.recipe import Recipe, save_recipe

# Weights of a model may lie in the same folder: they are no part of the tokenizer.
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
class Beside:
    """What lies beside the sharded state of a run."""

    recipe: Recipe
    summary: Mapping[str, Any]
    """`state.json`."""
    huggingface: Mapping[str, Any]
    """`huggingface/config.json`."""


def write_beside(folder: Path, beside: Beside) -> None:
    """Writes and syncs everything of a run's checkpoint but its sharded state and the manifest.

    Raises:
        OSError: the disk refuses, or the tokenizer is gone.
    """
    save_recipe(beside.recipe, folder / "recipe.yaml")
    model = {"model": beside.summary["model"]}
    (folder / "model.yaml").write_text(yaml.safe_dump(model, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (folder / "huggingface").mkdir()
    _write_json(folder / "huggingface" / "config.json", beside.huggingface)
    tokenizer = copy_tokenizer(Path(beside.recipe.data.tokenizer), folder / "tokenizer")
    _write_json(folder / STATE, beside.summary)
    for path in (
        folder / "recipe.yaml",
        folder / "model.yaml",
        folder / "huggingface" / "config.json",
        *tokenizer,
        folder / STATE,
    ):
        sync_file(path)
    for each in (folder / "huggingface", folder / "tokenizer"):
        sync_directory(each)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


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
    """Copies the tokenizer's own files into the new folder `target`; returns the copies."""
    if source.is_dir():
        files = sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()})
    else:
        files = [source]
    target.mkdir()
    return [Path(shutil.copy2(file, target / file.name)) for file in files]
