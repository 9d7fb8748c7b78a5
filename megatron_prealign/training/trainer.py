"""Training loop: runs a list of phases step by step."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.profiler import record_function

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import Recipe
from megatron_prealign.runtime.agreement import lost_ranks_as_user_errors
from megatron_prealign.runtime.distributed import Runtime
from megatron_prealign.runtime.optimizer import build_schedule, reset_optimizer
from megatron_prealign.training.callbacks import Callback
from megatron_prealign.training.phase import Phase


class Trainer:
    """Owns the model chunks, the optimizer and the state; phases define the steps, callbacks the periodic work."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        phases: Sequence[Phase],
        callbacks: Sequence[Callback],
        state: TrainState,
    ) -> None:
        self.recipe = recipe
        self.runtime = runtime
        self.chunks = chunks
        self.optimizer = optimizer
        self.phases = phases
        self.callbacks = callbacks
        self.state = state
        self.grad_norm: float | None = None
        self.eval_metrics: Mapping[str, float] = {}
        """Metrics of the last evaluation, by name such as validation_loss/en."""
        self.eval_step = -1
        """Step of the last evaluation."""

    @property
    def phase(self) -> Phase:
        return self.phases[self.state.phase]

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def train(self) -> None:
        """Trains from the current `state` to the end of the last phase, or until a stop is requested.

        Raises:
            UserError: Training diverged, a checkpoint cannot be written, or another process has ended.
        """
        with lost_ranks_as_user_errors("training"), ExitStack() as closing:
            for callback in self.callbacks:
                closing.callback(callback.on_close, self)
            for callback in self.callbacks:
                callback.on_start(self)
            while True:
                self._run_phase()
                if self.state.stop_requested or self.state.phase + 1 == len(self.phases):
                    break
                self.state.next_phase()
                if self.phase.fresh_optimizer:
                    reset_optimizer(self.optimizer)
            for callback in self.callbacks:
                callback.on_end(self)

    def _run_phase(self) -> None:
        phase, state = self.phase, self.state
        schedule = self.build_schedule(phase)
        phase.begin(state, self.chunks)
        try:
            if phase.is_over(state):
                # Resumed from the checkpoint at the phase's end; the run that wrote it has called on_phase_end.
                return
            for chunk in self.chunks:
                chunk.train()
            while not phase.is_over(state) and not state.stop_requested:
                self.step(phase, schedule)
                for callback in self.callbacks:
                    callback.on_step(self)
            if phase.is_over(state):
                for callback in self.callbacks:
                    callback.on_phase_end(self)
        finally:
            phase.end()

    def build_schedule(self, phase: Phase) -> OptimizerParamScheduler:
        """Returns the learning-rate schedule of a phase, advanced to its current step."""
        settings = phase.schedule_settings(self.state)
        schedule = build_schedule(
            self.optimizer,
            lr=settings.lr,
            min_lr=settings.min_lr,
            decay_style=settings.decay_style,
            warmup_iters=settings.warmup_iters,
            decay_iters=settings.decay_iters,
            weight_decay=self.recipe.optimizer.weight_decay,
            updates_frozen=settings.updates_frozen,
        )
        schedule.step(self.state.phase_step)
        return schedule

    def step(self, phase: Phase, schedule: OptimizerParamScheduler) -> None:
        """Runs one optimizer step of a phase."""
        start_s = time.perf_counter()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        # Before the update, so that the first step of a warm-up has a learning rate above 0.
        schedule.step(1)
        with record_function("forward-backward"):
            phase.forward_backward(self.state, self.chunks)
        with record_function("optimizer"):
            _, self.grad_norm, _ = self.optimizer.step()
        self._check_finite()
        phase.finish_step(self.state)
        self.state.seconds += time.perf_counter() - start_s

    def _check_finite(self) -> None:
        """Ends a diverged run before it can overwrite its last good checkpoint. The norm is already on the host."""
        if self.grad_norm is not None and not math.isfinite(self.grad_norm):
            raise UserError(
                f"training diverged: gradient norm of step {self.state.step + 1} is {self.grad_norm}; the last "
                f"checkpoint in {self.recipe.checkpoint_dir} precedes this step; lower the learning rate or check the "
                "data of this step"
            )
