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
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_prealign.checkpoint.folder import LATEST, step_name, working_name
from megatron_prealign.checkpoint.retention import prune, remove_unfinished
from megatron_prealign.disk import sync_file, sync_folder
from megatron_prealign.recipe import Recipe, save_recipe
from megatron_prealign.runtime.agreement import on_rank_zero
from megatron_prealign.runtime.checkpoint_io import OPTIMIZER_METADATA, disk_errors_as_mistakes, save_sharded
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.training.sharded_state import StateBeside, layout_of, model_state, random_state_of
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


class CheckpointStore:
    """Saves to one folder."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        *,
        identity: dict[str, Any],
        run: dict[str, Any],
        beside: StateBeside | None = None,
    ) -> None:
        """
        Args:
            identity: `run_identity.facts_of_model`.
            run: `run_identity.facts_of_run`.
            beside: what is saved beside the model and its optimizer; None for nothing.
        """
        self._recipe = recipe
        self._runtime = runtime
        self._identity = identity
        self._run = run
        self._beside = beside
        self.directory = recipe.checkpoint_dir

    def save(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        state: TrainState,
        *,
        phase: str,
        consumed: dict[str, int],
    ) -> Path:
        """Writes everything needed to resume. Takes part: all ranks.

        Args:
            phase: Name of the current phase.
            consumed: Samples taken from each source so far.

        Raises:
            UserError: the disk is full, read-only, or did not answer in time; raised on all ranks, and the checkpoint
                before it stays.
        """
        final = self.directory / step_name(state.step)
        working = self.directory / working_name(state.step)
        self._on_disk(final, "preparing", lambda: self._fresh_folder(working))
        model = model_state(chunks)
        content = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, metadata=OPTIMIZER_METADATA),
            "random_state": random_state_of(self._runtime),
            **self._content_beside(),
        }
        save_sharded(content, working, timeout_s=self._recipe.checkpoint.timeout_minutes * 60, name=final)
        summary = {
            **self._identity,
            "run": self._run,
            "train_state": state.to_dict(),
            "phase": phase,
            "layout": layout_of(self._runtime),
            "consumed_samples_per_source": consumed,
        }
        self._on_disk(final, "completing", lambda: self._complete(working, final, summary))
        logger.info("saved %s", final)
        return final

    def _content_beside(self) -> dict[str, Any]:
        return {} if self._beside is None else {"beside": self._beside.sharded_state_dict()}

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


def _copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copies the tokenizer's own files; returns the copies."""
    if source.is_dir():
        files = sorted({file for pattern in _TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()})
    else:
        files = [source]
    target.mkdir()
    return [Path(shutil.copy2(file, target / file.name)) for file in files]
