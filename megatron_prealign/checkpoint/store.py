"""Saving a run's checkpoints: written beside, renamed when complete, found again by a `latest` file.

A checkpoint is a directory `step_00000400` with the sharded state (Megatron-Core's `dist_checkpointing`), `state.json`
(what a reader wants to know without loading tensors), the recipe, the tokenizer and a manifest with the checksum of
every file. It loads in any parallel layout.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_prealign.checkpoint.commands.list import directory_bytes
from megatron_prealign.checkpoint.commit import RunFiles, commit, tidy, write_run_files
from megatron_prealign.checkpoint.directory import is_complete, named_latest, step_name, working_name
from megatron_prealign.checkpoint.manifest import FileRecord
from megatron_prealign.checkpoint.retention import remove_unfinished
from megatron_prealign.checkpoint.sharded.model_state import AuxiliaryState, layout_of, model_state, random_state_of
from megatron_prealign.checkpoint.sharded.optimizer_state import optimizer_state
from megatron_prealign.checkpoint.sharded.save import BackgroundSave, HostBuffers, stage
from megatron_prealign.checkpoint.sharded.target import Target
from megatron_prealign.checkpoint.state import run_state
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.agreement import from_rank_zero
from megatron_prealign.runtime.distributed import Runtime

logger = logging.getLogger(__name__)


@dataclass
class SaveReport:
    """How long a save took and how much it wrote."""

    phase: str
    step: int
    paused_s: float
    """Training stood still for so long: for the copy into host memory, or for all of a save it waits for."""
    waited_s: float
    """And before that, for the save before this one."""
    seconds: float = 0.0
    """From the request until the checkpoint was complete."""
    bytes: int = 0
    """Size of the whole checkpoint."""

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / max(self.seconds, 1e-9)


class CheckpointStore:
    """Saves to one directory, one checkpoint at a time."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        *,
        identity: Mapping[str, Any],
        run: Mapping[str, Any],
        huggingface: Mapping[str, Any],
        versions: Mapping[str, str],
        beside: AuxiliaryState | None = None,
    ) -> None:
        """
        Args:
            identity: `state.model_identity`.
            run: `resume.identity.resume_fingerprint`.
            huggingface: config.json of the model, as Hugging Face has it.
            versions: of the packages the run uses.
            beside: what is saved beside the model and its optimizer; None for nothing.
        """
        self._recipe = recipe
        self._runtime = runtime
        self._identity = identity
        self._run = run
        self._huggingface = huggingface
        self._versions = versions
        self._beside = beside
        self._buffers = HostBuffers()
        self._writing: BackgroundSave | None = None
        self.directory = recipe.checkpoint_dir
        self.reports: list[SaveReport] = []
        """On rank 0, of the saves that were completed since somebody took them from here."""
        self.longest_s = 0.0
        """The longest save so far, from its request until it was complete."""

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save under way cannot succeed."""
        return self._writing is not None and self._writing.failed

    @property
    def in_progress(self) -> bool:
        """Whether this rank has not done its part of the last save yet."""
        return self._writing is not None and not self._writing.is_over

    def save(
        self,
        chunks: Sequence[torch.nn.Module],
        optimizer: MegatronOptimizer,
        state: TrainState,
        *,
        phase: str,
        consumed: Mapping[str, int],
        blend: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        """Saves everything needed to resume. Takes part: all ranks.

        With `checkpoint.async_save` it returns when the state is copied; the checkpoint is complete when `finish` has
        returned. Waits for the save before this one.

        Args:
            phase: Name of the current phase.
            consumed: Samples taken from each source so far.
            blend: `TrainSamples.blend_state`.
            metrics: What was measured after this very step.

        Raises:
            UserError: the disk is full, read-only, or did not answer in time, for this save or the one before it;
                raised on all ranks, and the newest complete checkpoint stays.
        """
        asked_s = time.perf_counter()
        self.finish()
        start_s = time.perf_counter()
        final = self.directory / step_name(state.step)
        working = self.directory / working_name(state.step)
        timeout_s = self._recipe.checkpoint.timeout_minutes * 60
        previous = from_rank_zero(f"preparing {final}", lambda: self._fresh_directory(Target(working, final, None)))
        target = Target(working, final, previous)
        model = model_state(chunks)
        content = {
            **model,
            "optimizer": optimizer_state(optimizer, model),
            "random_state": random_state_of(self._runtime),
            **({} if self._beside is None else {"beside": self._beside.sharded_state_dict()}),
        }
        # On a GPU's host lies nothing that training changes.
        copy = self._recipe.checkpoint.async_save and self._runtime.device.type == "cpu"
        staged = stage(content, target, buffers=self._buffers, copy=copy, timeout_s=timeout_s)
        paused_s = time.perf_counter() - start_s
        report = SaveReport(phase, state.step, paused_s=paused_s, waited_s=start_s - asked_s)
        files = RunFiles(
            recipe=self._recipe,
            state=run_state(
                self._identity,
                layout=layout_of(self._runtime),
                run=self._run,
                train_state=state.to_dict(),
                phase=phase,
                consumed=consumed,
                blend=blend,
                metrics=metrics,
                versions=self._versions,
            ),
            huggingface=self._huggingface,
        )
        complete = self._completion(target, files, report, start_s)
        self._writing = BackgroundSave(staged, timeout_s=timeout_s, complete=complete)
        if self._recipe.checkpoint.async_save:
            logger.info(
                "checkpoint of step %d requested: training paused %.2f s to copy %.2f GB%s",
                state.step,
                report.paused_s,
                staged.bytes / 1e9,
                f", after {report.waited_s:.1f} s for the one before it" if report.waited_s > 1 else "",
            )
        else:
            self.finish()

    def finish(self) -> None:
        """Waits until the save under way, if there is one, is complete. Takes part: all ranks.

        Raises:
            UserError: it failed; raised on all ranks.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    def settle(self) -> None:
        """Waits for this rank's part of the save under way, when the ranks no longer agree about anything: after an
        error. What becomes of it is logged."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.wait_after_error()
        except Exception as error:
            logger.error("%s", error)

    def _completion(
        self, target: Target, files: RunFiles, report: SaveReport, start_s: float
    ) -> Callable[[Mapping[str, FileRecord]], None]:
        """What rank 0 does in the background when the sharded state of all ranks is written."""

        def complete(records: Mapping[str, FileRecord]) -> None:
            write_run_files(target.working, files)
            commit(target.working, target.final, records)
            report.seconds = time.perf_counter() - start_s
            if not self._recipe.checkpoint.async_save:
                report.paused_s = report.seconds
            report.bytes = directory_bytes(target.final)
            self.longest_s = max(self.longest_s, report.seconds)
            self.reports.append(report)
            logger.info(
                "checkpoint %s committed: %.2f GB in %.1f s (%.2f GB/s)",
                target.final,
                report.bytes / 1e9,
                report.seconds,
                report.bytes_per_second / 1e9,
            )
            tidy(target.final, self._recipe)

        return complete

    def _fresh_directory(self, target: Target) -> str | None:
        """Makes the directory to write into; returns the name of the newest complete checkpoint."""

        def look() -> str | None:
            named = named_latest(self.directory)
            return named.name if named is not None and is_complete(named) else None

        def make() -> None:
            remove_unfinished(self.directory)
            target.working.mkdir(parents=True)

        timeout_s = self._recipe.checkpoint.timeout_minutes * 60
        previous = target.answer(look, timeout_s)
        Target(target.working, target.final, previous).answer(make, timeout_s)
        return previous
