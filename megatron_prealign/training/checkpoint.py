"""Checkpoints: written beside, renamed when complete, found again by a `latest` file.

A checkpoint is a folder `step_00000400` with the sharded state (Megatron-Core's `dist_checkpointing`), `state.json`
(what a reader wants to know without loading tensors), `recipe.yaml` and a copy of the tokenizer. It loads in any
parallel layout.
"""

import json
import logging
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_prealign.errors import UserError
from megatron_prealign.recipe import Recipe, recipe_to_dict, save_recipe
from megatron_prealign.runtime.agreement import on_rank_zero
from megatron_prealign.runtime.checkpoint_io import OPTIMIZER_METADATA, load_sharded, save_sharded
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.engine import unwrap
from megatron_prealign.training.state import TrainState

logger = logging.getLogger(__name__)

LATEST = "latest"


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in `directory`, or None when there is none.

    Raises:
        UserError: `latest` names a checkpoint that is not there.
    """
    pointer = directory / LATEST
    if not pointer.exists():
        return None
    checkpoint = directory / pointer.read_text(encoding="utf-8").strip()
    if not (checkpoint / "state.json").exists():
        raise UserError(
            f"{pointer} names {checkpoint.name}, which is not a complete checkpoint there; "
            f"restore it, or write the name of another step_* folder of {directory} into {pointer}"
        )
    return checkpoint


def resolve_checkpoint(path: str | Path) -> Path:
    """A checkpoint folder given as itself, as the folder of checkpoints, or as the run's folder.

    Raises:
        UserError: there is no complete checkpoint at any of these.
    """
    path = Path(path)
    if (path / "state.json").exists():
        return path
    for directory in (path, path / "checkpoints"):
        found = latest_checkpoint(directory)
        if found is not None:
            return found
    raise UserError(
        f"{path} holds no complete checkpoint; expected a step_* folder, a folder with `{LATEST}`, or a run's folder"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's `state.json`.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{checkpoint / 'state.json'} is damaged ({error}); use another checkpoint") from error


def _layout(runtime: Runtime) -> dict[str, int]:
    return {
        "tensor_model_parallel_size": runtime.parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": runtime.parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": runtime.parallel.model_chunks,
        "data_parallel_size": runtime.data_size,
    }


def _random_state(runtime: Runtime) -> ShardedObject:
    """This rank's random states; one object per rank, since dropout differs between ranks."""
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    shape = (runtime.groups.pp.size(), runtime.groups.tp.size(), runtime.data_size)
    rank = (runtime.pipeline_rank, runtime.tensor_rank, runtime.data_rank)
    return ShardedObject("random_state", states, shape, rank, replica_id=0)


def _restore_random_state(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def _model_state(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {f"model{index}": unwrap(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}


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
    ) -> None:
        self._recipe = recipe
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
        consumed: dict[str, int],
    ) -> Path:
        """Writes everything needed to resume. Takes part: all ranks. `consumed`: samples taken from each source so
        far."""
        final = self.directory / step_name(state.step)
        working = self.directory / f".{final.name}.incomplete"
        on_rank_zero(f"preparing {working}", lambda: _fresh_folder(working))
        model = _model_state(chunks)
        content = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, metadata=OPTIMIZER_METADATA),
            "random_state": _random_state(self._runtime),
        }
        save_sharded(content, working, timeout_s=self._recipe.checkpoint.timeout_minutes * 60)
        summary = {
            **self._identity,
            "train_state": state.to_dict(),
            "phase": phase,
            "layout": _layout(self._runtime),
            "consumed_samples_per_source": consumed,
        }
        on_rank_zero(f"completing {final}", lambda: self._complete(working, final, summary))
        logger.info("saved %s", final)
        return final

    def _complete(self, working: Path, final: Path, summary: dict[str, Any]) -> None:
        save_recipe(self._recipe, working / "recipe.yaml")
        _copy_tokenizer(Path(self._recipe.data.tokenizer), working / "tokenizer")
        (working / "state.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False), encoding="utf-8")
        for file in working.rglob("*"):
            if file.is_file():
                _sync(file)
        if final.exists():
            # A run that was resumed from an older checkpoint reaches this step again.
            shutil.rmtree(final)
        os.replace(working, final)
        pointer = self.directory / f".{LATEST}.incomplete"
        pointer.write_text(final.name + "\n", encoding="utf-8")
        _sync(pointer)
        os.replace(pointer, self.directory / LATEST)
        _sync(self.directory)
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        complete = sorted(path for path in self.directory.glob("step_*") if (path / "state.json").exists())
        older = [path for path in complete if path != newest]
        for path in older[: max(0, len(older) - self._recipe.checkpoint.keep + 1)]:
            shutil.rmtree(path)

    def resume(self, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer) -> TrainState | None:
        """Loads the newest checkpoint of this run, if there is one. Takes part: all ranks.

        Raises:
            UserError: it is of another model or tokenizer, or damaged.
        """
        checkpoint = latest_checkpoint(self.directory)
        if checkpoint is None:
            return None
        summary = read_state(checkpoint)
        self._check_identity(checkpoint, summary)
        model = _model_state(chunks)
        content = {
            **model,
            "optimizer": optimizer.sharded_state_dict(model, is_loading=True, metadata=OPTIMIZER_METADATA),
        }
        same_layout = summary["layout"] == _layout(self._runtime)
        if same_layout:
            content["random_state"] = _random_state(self._runtime)
        else:
            logger.warning("the layout changed since %s: dropout draws anew, everything else continues", checkpoint)
        loaded = self._read(content, checkpoint)
        _load_weights(chunks, loaded)
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
        if same_layout:
            _restore_random_state(loaded["random_state"])
        logger.info("resumed from %s", checkpoint)
        return TrainState.from_dict(summary["train_state"])

    def load_weights(
        self, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, path: str | Path
    ) -> None:
        """Takes the weights alone from a checkpoint of any run. Takes part: all ranks.

        Raises:
            UserError: it is of another model or tokenizer, or damaged.
        """
        checkpoint = resolve_checkpoint(path)
        self._check_identity(checkpoint, read_state(checkpoint))
        _load_weights(chunks, self._read(_model_state(chunks), checkpoint))
        if optimizer is not None:
            optimizer.reload_model_params()
        logger.info("took the weights of %s", checkpoint)

    def _read(self, content: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.core import CheckpointingException

        try:
            return load_sharded(content, checkpoint)
        except (CheckpointingException, OSError, EOFError, RuntimeError, ValueError) as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{checkpoint} cannot be read ({type(error).__name__}: {first_line}); it is damaged or incomplete, "
                f"write the name of an older step_* folder into {checkpoint.parent / LATEST}"
            ) from error

    def _check_identity(self, checkpoint: Path, summary: dict[str, Any]) -> None:
        # What only says how to compute or how to lay out does not have to agree.
        free = {
            "hidden_dropout",
            "attention_dropout",
            "transformer_impl",
            "make_vocab_size_divisible_by",
            "init_method_std",
        }
        free |= {"recompute_granularity", "recompute_num_layers"}
        saved = {**summary["model"], "vocab_size": summary["vocab_size"], "tokenizer": summary["tokenizer_fingerprint"]}
        mine = {
            **self._identity["model"],
            "vocab_size": self._identity["vocab_size"],
            "tokenizer": self._identity["tokenizer_fingerprint"],
        }
        different = [
            f"{name} {saved.get(name)} (recipe: {mine[name]})"
            for name in mine
            if name not in free and saved.get(name) != mine[name]
        ]
        if different:
            raise UserError(
                f"{checkpoint} is of another model: {', '.join(different)}; "
                "make the recipe agree, or set checkpoint.directory (or logging.run_dir) to a new folder"
            )


def _load_weights(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded[f"model{index}"])


def _fresh_folder(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)


def _copy_tokenizer(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.mkdir()
        shutil.copy2(source, target / source.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
