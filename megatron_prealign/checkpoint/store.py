"""Saves a run's checkpoints: written to a hidden directory, renamed when complete, named by a `latest` file.

A checkpoint is a directory `step_00000400` with the sharded state (Megatron-Core's `dist_checkpointing`), `state.json`
(metadata for readers that load no tensors), the recipe, the tokenizer and a manifest with the checksum of every file.
It loads in any parallel layout.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_prealign.checkpoint.commit import RunFiles, commit, remove_obsolete, write_run_files
from megatron_prealign.checkpoint.directory import directory_bytes, is_complete, named_latest, step_name, working_name
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
    """Duration and size of a save."""

    phase: str
    step: int
    paused_s: float
    """Seconds that training was paused: for the copy into host memory, or for the complete save without async_save."""
    waited_s: float
    """Seconds that training waited for the previous save before that."""
    seconds: float = 0.0
    """Seconds from the request until the checkpoint was complete."""
    bytes: int = 0
    """Size of the complete checkpoint."""

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
        auxiliary: AuxiliaryState | None = None,
    ) -> None:
        """
        Args:
            identity: `state.model_identity`.
            run: `resume.identity.resume_fingerprint`.
            huggingface: Hugging Face config.json of the model.
            versions: Versions of the packages the run uses.
            auxiliary: State to save besides the model and its optimizer; None for none.
        """
        self._recipe = recipe
        self._runtime = runtime
        self._identity = identity
        self._run = run
        self._huggingface = huggingface
        self._versions = versions
        self._auxiliary = auxiliary
        self._buffers = HostBuffers()
        self._current: BackgroundSave | None = None
        self.directory = recipe.checkpoint_dir
        self.reports: list[SaveReport] = []
        """On rank 0, reports of completed saves; the caller removes the ones it has read."""
        self.longest_s = 0.0
        """Duration of the longest save so far in seconds, from its request until it was complete."""

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in progress cannot succeed."""
        return self._current is not None and self._current.failed

    @property
    def in_progress(self) -> bool:
        """Whether this rank has not finished its part of the last save."""
        return self._current is not None and not self._current.is_done

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
        phase_over: bool = False,
    ) -> None:
        """Saves everything needed to resume. Collective: call on all ranks.

        Waits for the previous save. With `checkpoint.async_save` it returns when the state is copied; the checkpoint is
        complete when `finish` has returned.

        Args:
            phase: Name of the current phase.
            consumed: Samples consumed from each source so far.
            blend: `TrainSamples.blend_state`.
            metrics: Metrics measured after this step.
            phase_over: Whether this was the last step of the phase.

        Raises:
            UserError: the disk is full, read-only, or did not respond in time, for this save or the previous one;
                raised on all ranks, and the newest complete checkpoint is kept.
        """
        requested_s = time.perf_counter()
        self.finish()
        start_s = time.perf_counter()
        final = self.directory / step_name(state.step)
        working = self.directory / working_name(state.step)
        timeout_s = self._recipe.checkpoint.timeout_minutes * 60
        previous = from_rank_zero(f"preparing {final}", lambda: self._make_directory(Target(working, final, None)))
        target = Target(working, final, previous)
        model = model_state(chunks)
        content = {
            **model,
            "optimizer": optimizer_state(optimizer, model),
            "random_state": random_state_of(self._runtime),
            **({} if self._auxiliary is None else {"auxiliary": self._auxiliary.sharded_state_dict()}),
        }
        # With a GPU, training changes nothing that is in host memory.
        copy = self._recipe.checkpoint.async_save and self._runtime.device.type == "cpu"
        staged = stage(content, target, buffers=self._buffers, copy=copy, timeout_s=timeout_s)
        paused_s = time.perf_counter() - start_s
        report = SaveReport(phase, state.step, paused_s=paused_s, waited_s=start_s - requested_s)
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
                phase_over=phase_over,
            ),
            huggingface=self._huggingface,
        )
        complete = self._completion(target, files, report, start_s)
        self._current = BackgroundSave(staged, timeout_s=timeout_s, complete=complete)
        if self._recipe.checkpoint.async_save:
            logger.info(
                "checkpoint of step %d requested: training paused %.2f s to copy %.2f GB%s",
                state.step,
                report.paused_s,
                staged.bytes / 1e9,
                f" after waiting {report.waited_s:.1f} s for the previous save" if report.waited_s > 1 else "",
            )
        else:
            self.finish()

    def finish(self) -> None:
        """Waits until the save in progress, if any, is complete. Collective: call on all ranks.

        Raises:
            UserError: the save failed; raised on all ranks.
        """
        current, self._current = self._current, None
        if current is not None:
            current.finish()

    def finish_after_error(self) -> None:
        """Waits for this rank's part of the save in progress after an error, when collectives are no longer possible;
        logs an error of the save."""
        current, self._current = self._current, None
        if current is None:
            return
        try:
            current.wait_after_error()
        except Exception as error:
            logger.error("%s", error)

    def _completion(
        self, target: Target, files: RunFiles, report: SaveReport, start_s: float
    ) -> Callable[[Mapping[str, FileRecord]], None]:
        """Function that rank 0 runs in the background when the sharded state of all ranks is written."""

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
                "saved checkpoint %s (%.2f GB in %.1f s, %.2f GB/s)",
                target.final,
                report.bytes / 1e9,
                report.seconds,
                report.bytes_per_second / 1e9,
            )
            remove_obsolete(target.final, self._recipe)

        return complete

    def _make_directory(self, target: Target) -> str | None:
        """Makes the directory to write to; returns the name of the newest complete checkpoint, None without one."""

        def find_previous() -> str | None:
            named = named_latest(self.directory)
            return named.name if named is not None and is_complete(named) else None

        def make() -> None:
            remove_unfinished(self.directory)
            target.working.mkdir(parents=True)

        timeout_s = self._recipe.checkpoint.timeout_minutes * 60
        previous = target.run_with_timeout(find_previous, timeout_s)
        Target(target.working, target.final, previous).run_with_timeout(make, timeout_s)
        return previous
