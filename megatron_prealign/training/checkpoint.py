"""Checkpoints: written beside, renamed when complete, found again by a `latest` file.

A checkpoint is a folder `step_00000400` with the sharded state (Megatron-Core's `dist_checkpointing`), `state.json`
(what a reader wants to know without loading tensors), `recipe.yaml` and a copy of the tokenizer. It loads in any
parallel layout.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.optimizer import MegatronOptimizer

from megatron_prealign.disk import sync_file, sync_folder
from megatron_prealign.recipe import Recipe, recipe_to_dict, save_recipe
from megatron_prealign.runtime import random_state
from megatron_prealign.runtime.agreement import on_every_rank, on_rank_zero
from megatron_prealign.runtime.checkpoint_io import (
    OPTIMIZER_METADATA,
    check_files,
    disk_errors_as_mistakes,
    load_sharded,
    read_errors_as_mistakes,
    save_sharded,
)
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import unwrap
from megatron_prealign.training.checkpoint_folder import LATEST, latest_checkpoint, read_state, resolve_checkpoint
from megatron_prealign.training.retention import prune, remove_unfinished, step_name, working_name
from megatron_prealign.training.run_identity import (
    OTHER_WEIGHTS,
    check_model,
    check_run,
    facts_of_run,
)
from megatron_prealign.training.state import TrainState

logger = logging.getLogger(__name__)

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


def _layout(runtime: Runtime) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": runtime.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": runtime.parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": runtime.parallel.model_chunks,
        "data_parallel_size": runtime.data_size,
        "device": runtime.device.type,
    }


def _random_state(runtime: Runtime) -> ShardedObject:
    """This rank's random states; one object per rank, since dropout differs between ranks."""
    shape = (runtime.groups.pp.size(), runtime.groups.tp.size(), runtime.data_size)
    rank = (runtime.pipeline_rank, runtime.tensor_rank, runtime.data_rank)
    return ShardedObject("random_state", random_state.capture(), shape, rank, replica_id=0)


def _model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {f"model{index}": unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}


class StateBeside(Protocol):
    """State of a run beside its model and optimizer, in the form of `dist_checkpointing`."""

    def sharded_state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, content: dict[str, Any]) -> None: ...


class CheckpointStore:
    """Saves to and resumes from one folder."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        *,
        vocab_size: int,
        padded_vocab_size: int,
        tokenizer_fingerprint: str,
        switching: dict[str, Any] | None = None,
        beside: StateBeside | None = None,
    ) -> None:
        """
        Args:
            switching: `run_identity.facts_of_switching`; None without code-switching, or to read weights alone.
            beside: what is saved and resumed beside the model and its optimizer; None for nothing.
        """
        self._recipe = recipe
        self._switching = switching
        self._beside = beside
        self._runtime = runtime
        self.directory = recipe.checkpoint_dir
        self._identity = {
            "vocab_size": vocab_size,
            "padded_vocab_size": padded_vocab_size,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "model": recipe_to_dict(recipe)["model"],
        }

    def save(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        state: TrainState,
        *,
        phase: str,
        phases: Sequence[str],
        num_samples: int,
        segmenters: Sequence[str | None],
        consumed: dict[str, int],
    ) -> Path:
        """Writes everything needed to resume. Takes part: all ranks.

        Args:
            phase: Name of the current phase.
            phases: Names of all phases of the run, in order.
            num_samples: Rows of the training blend.
            segmenters: Who marked the words of each source.
            consumed: Samples taken from each source so far.

        Raises:
            UserError: the disk is full, read-only, or did not answer in time; raised on all ranks, and the checkpoint
                before it stays.
        """
        final = self.directory / step_name(state.step)
        working = self.directory / working_name(state.step)
        self._on_disk(final, "preparing", lambda: self._fresh_folder(working))
        model = _model_state(chunks)
        content = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, metadata=OPTIMIZER_METADATA),
            "random_state": _random_state(self._runtime),
            **self._content_beside(),
        }
        save_sharded(content, working, timeout_s=self._recipe.checkpoint.timeout_minutes * 60, name=final)
        summary = {
            **self._identity,
            "run": self._facts(phases, num_samples, segmenters),
            "train_state": state.to_dict(),
            "phase": phase,
            "layout": _layout(self._runtime),
            "consumed_samples_per_source": consumed,
        }
        self._on_disk(final, "completing", lambda: self._complete(working, final, summary))
        logger.info("saved %s", final)
        return final

    def _content_beside(self) -> dict[str, Any]:
        return {} if self._beside is None else {"beside": self._beside.sharded_state_dict()}

    def _facts(self, phases: Sequence[str], num_samples: int, segmenters: Sequence[str | None]) -> dict[str, Any]:
        return facts_of_run(
            self._recipe, phases=phases, num_samples=num_samples, segmenters=segmenters, switching=self._switching
        )

    def _on_disk(self, final: Path, what: str, work: Callable[[], None]) -> None:
        def guarded() -> None:
            with disk_errors_as_mistakes(final):
                work()

        on_rank_zero(f"{what} {final}", guarded)

    def _fresh_folder(self, working: Path) -> None:
        remove_unfinished(self.directory)
        working.mkdir(parents=True)

    def _complete(self, working: Path, final: Path, summary: dict[str, Any]) -> None:
        save_recipe(self._recipe, working / "recipe.yaml")
        tokenizer = _copy_tokenizer(Path(self._recipe.data.tokenizer), working / "tokenizer")
        (working / "state.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
        # The sharded files were synced by the ranks that wrote them.
        for path in (working / "recipe.yaml", *tokenizer, working / "state.json"):
            sync_file(path)
        for folder in (working / "tokenizer", working):
            sync_folder(folder)
        abandoned = self.directory / f".{final.name}.abandoned.incomplete"
        if final.exists():
            # A run that was resumed from an older checkpoint reaches this step again.
            os.replace(final, abandoned)
        os.replace(working, final)
        pointer = self.directory / f".{LATEST}.incomplete"
        pointer.write_text(final.name + "\n", encoding="utf-8")
        sync_file(pointer)
        os.replace(pointer, self.directory / LATEST)
        sync_folder(self.directory)
        remove_unfinished(self.directory)
        prune(self.directory, final, self._recipe.checkpoint.keep)

    def resume(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        *,
        phases: Sequence[str],
        num_samples: int,
        segmenters: Sequence[str | None],
    ) -> TrainState | None:
        """Loads the newest checkpoint of this run, if there is one. Takes part: all ranks.

        Args:
            phases: Names of all phases of the run, in order; the state's `phase` is a position in it.
            num_samples: Rows of the training blend.
            segmenters: Who marked the words of each source.

        Raises:
            UserError: it is of another model, tokenizer, phase, number format, order of the data or dictionary, or
                damaged.
        """
        checkpoint = latest_checkpoint(self.directory)
        if checkpoint is None:
            return None
        summary = read_state(checkpoint)
        check_model(checkpoint, summary, self._identity)
        phase = check_run(checkpoint, summary, self._facts(phases, num_samples, segmenters))
        on_every_rank(f"reading {checkpoint}", lambda: self._reading(checkpoint, lambda: check_files(checkpoint)))
        self._reading(checkpoint, lambda: self._load_all(chunks, optimizer, checkpoint, summary["layout"]))
        logger.info("resumed from %s", checkpoint)
        return TrainState.from_dict({**summary["train_state"], "phase": phase})

    def _load_all(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        checkpoint: Path,
        saved_layout: dict[str, Any],
    ) -> None:
        model = _model_state(chunks)
        content = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=OPTIMIZER_METADATA),
            **self._content_beside(),
        }
        same_layout = saved_layout == _layout(self._runtime)
        if same_layout:
            content["random_state"] = _random_state(self._runtime)
        else:
            logger.warning("the layout changed since %s: dropout draws anew, everything else continues", checkpoint)
        loaded = load_sharded(content, checkpoint)
        _load_weights(chunks, loaded)
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
            if self._beside is not None:
                self._beside.load_state_dict(loaded["beside"])
        if same_layout:
            random_state.restore(loaded["random_state"])

    def load_weights(
        self, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, path: str | Path
    ) -> None:
        """Takes the weights alone from a checkpoint of any run. Takes part: all ranks.

        Raises:
            UserError: it is of another model or tokenizer, or damaged.
        """
        checkpoint = resolve_checkpoint(path)
        check_model(checkpoint, read_state(checkpoint), self._identity, advice=OTHER_WEIGHTS)
        on_every_rank(f"reading {checkpoint}", lambda: self._reading(checkpoint, lambda: check_files(checkpoint)))
        self._reading(checkpoint, lambda: _load_weights(chunks, load_sharded(_model_state(chunks), checkpoint)))
        if optimizer is not None:
            optimizer.reload_model_params()
        logger.info("took the weights of %s", checkpoint)

    def _reading(self, checkpoint: Path, work: Callable[[], None]) -> None:
        advice = f"write the name of an older step_* folder into {checkpoint.parent / LATEST}"
        with read_errors_as_mistakes(checkpoint, advice):
            work()


def _load_weights(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"])


def _copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copies the tokenizer's own files; returns the copies."""
    if source.is_dir():
        files = sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()})
    else:
        files = [source]
    target.mkdir()
    return [Path(shutil.copy2(file, target / file.name)) for file in files]
