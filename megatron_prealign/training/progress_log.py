"""Logs the metrics of training every few steps, and at least once a minute."""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_prealign.model.flops import peak_flops, training_flops_per_token
from megatron_prealign.progress import Progress
from megatron_prealign.recipe import Recipe
from megatron_prealign.recipe.phases import ALIGNMENT
from megatron_prealign.text import clock, duration, plural
from megatron_prealign.training.callbacks import Callback
from megatron_prealign.training.meter import max_over_ranks
from megatron_prealign.training.metrics_log import MetricsLog
from megatron_prealign.training.position import position, total_steps

if TYPE_CHECKING:
    from megatron_prealign.training.trainer import Trainer

logger = logging.getLogger(__name__)

LONGEST_SILENCE_S = 60.0
"""Time between two log lines at most, whatever logging.log_interval is; a line needs a finished step."""


class ProgressLog(Callback):
    """Logs loss, learning rate, gradient norm, throughput, switched words and memory; MFU if the device's peak FLOPS
    are known.

    A line is due every `logging.log_interval` steps, after the first step of a process and of a phase, and after the
    number of steps that fit into `LONGEST_SILENCE_S`. Metrics are summed over all ranks, so rank 0, whose clock counts,
    sends that number with each line.
    """

    def __init__(self, recipe: Recipe, metrics: MetricsLog, *, padded_vocab_size: int) -> None:
        self._recipe = recipe
        self._metrics = metrics
        self._flops_per_token = training_flops_per_token(
            recipe.model, vocab_size=padded_vocab_size, seq_length=recipe.data.seq_length
        )
        self._bar: Progress | None = None
        self._latest_step = 0
        self._estimates = 0

    def on_start(self, trainer: "Trainer") -> None:
        self._enabled = trainer.runtime.rank == 0
        self._start_interval(trainer)

    def _start_interval(self, trainer: "Trainer") -> None:
        self._since_s = trainer.state.seconds
        self._since_tokens = trainer.state.tokens
        self._since_step = trainer.state.step

    def on_step(self, trainer: "Trainer") -> None:
        self._show_progress(trainer)
        state = trainer.state
        if (
            state.step % self._recipe.logging.log_interval == 0
            or state.phase_step == 1
            or state.step >= self._latest_step
        ):
            self._log(trainer)

    def on_phase_end(self, trainer: "Trainer") -> None:
        if trainer.state.step > self._since_step:
            self._log(trainer)
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_end(self, trainer: "Trainer") -> None:
        if trainer.state.step > self._since_step:
            self._log(trainer)

    def on_close(self, trainer: "Trainer") -> None:
        if self._bar is not None:
            self._bar.close()
        self._metrics.close()

    def _show_progress(self, trainer: "Trainer") -> None:
        """Shows a progress bar with ETA on a terminal; in a log file the log lines contain the ETA."""
        import sys

        if not self._enabled or not sys.stderr.isatty():
            return
        if self._bar is None:
            phase, state = trainer.phase, trainer.state
            self._bar = Progress(phase.name, total_steps(trainer.phases, state), unit="steps")
            self._bar.update(state.step - 1)
        self._bar.update()

    def _log(self, trainer: "Trainer") -> None:
        """Logs the metrics since the last call. Collective: call on all ranks (the metrics are summed over them)."""
        state, phase = trainer.state, trainer.phase
        values = phase.metrics(state.step - self._since_step)
        waited_s = max_over_ranks(phase.drain_waited_s(), trainer.runtime) / (state.step - self._since_step)
        elapsed_s = max(state.seconds - self._since_s, 1e-9)
        tokens_per_second = (state.tokens - self._since_tokens) / elapsed_s
        record = {
            "kind": "train",
            "phase": phase.name,
            "step": state.step,
            "phase_step": state.phase_step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            **values,
            "learning_rate": trainer.learning_rate,
            "grad_norm": trainer.grad_norm,
            "tokens_per_second": round(tokens_per_second, 1),
            "data_wait_ms": round(1e3 * waited_s, 3),
            "memory_gb": round(_memory_gb(trainer.runtime.device), 3),
        }
        if trainer.runtime.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name())
            if peak is not None:
                per_gpu = tokens_per_second * self._flops_per_token / trainer.runtime.world_size
                record["mfu"] = round(per_gpu / peak, 4)
        step_s = elapsed_s / (state.step - self._since_step)
        if self._enabled:
            eta = self._eta(trainer, step_s, tokens_per_second)
            self._estimate(state.step, step_s, eta)
            logger.info(_line(record, position(trainer), eta))
            self._metrics.write(record)
        self._start_interval(trainer)
        self._latest_step = state.step + self._steps_until_late(step_s, trainer.runtime.device)

    def _estimate(self, step: int, step_s: float, eta: str) -> None:
        """Logs the time left in words: after the first step of the process, and once when it is known how long the
        others take, since the first one compiles kernels, opens connections and allocates memory."""
        self._estimates += 1
        if self._estimates == 1:
            logger.info(
                "the first step took %s, start-up included; time left if all took as long: %s", duration(step_s), eta
            )
        elif self._estimates == 2:
            first = self._since_step + 1
            steps = f"step {step}" if step == first else f"steps {first} to {step}"
            logger.info(
                "a step takes about %s (%s); time left: %s, without evaluations and saves", duration(step_s), steps, eta
            )

    @staticmethod
    def _steps_until_late(step_s: float, device: torch.device) -> int:
        """Steps that fit into `LONGEST_SILENCE_S` by rank 0's clock, at least one. Collective: call on all ranks."""
        steps = torch.tensor([max(1, int(LONGEST_SILENCE_S / step_s))], device=device)
        dist.broadcast(steps, src=0)
        return int(steps.item())

    def _eta(self, trainer: "Trainer", step_s: float, tokens_per_second: float) -> str:
        """Time left in the phase and in the run; later phases are estimated to process as many tokens per second."""
        state, recipe = trainer.state, self._recipe
        left = trainer.phase.total_iters(state) - state.phase_step
        later = total_steps(trainer.phases, state) - state.step - left
        phase_s = left * step_s
        if not later:
            return f"{clock(phase_s)} (run)"
        later_s = later * recipe.training.global_batch_size * recipe.data.seq_length / max(tokens_per_second, 1e-9)
        return f"{clock(phase_s)} ({trainer.phase.name}), {clock(phase_s + later_s)} (run)"


def _memory_gb(device: torch.device) -> float:
    """Peak memory of this process in GB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _line(record: dict[str, Any], where: str, eta: str) -> str:
    """Human-readable line of a record."""
    parts = [where, f"loss {record['loss']:.4f}"]
    if record["phase"] == ALIGNMENT and record.get("lm_loss") is not None:
        parts.append(f"lm loss {record['lm_loss']:.4f}")
    if aligned := [loss for loss in record.get("alignment_loss") or () if loss is not None]:
        parts.append(f"alignment loss {math.fsum(aligned) / len(aligned):.4f}")
    if record.get("word_steps"):
        parts.append(f"words in {plural(record['word_steps'], 'step')}")
    if "switched_word_rate" in record:
        parts.append(f"switched {record['switched_word_rate']:.2%}")
    parts.append(f"lr {record['learning_rate']:.2e}")
    if record["grad_norm"] is not None:
        parts.append(f"grad norm {record['grad_norm']:.3f}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record["data_wait_ms"] >= 1:
        parts.append(f"data wait {record['data_wait_ms']:.0f} ms")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts.append(f"memory {record['memory_gb']:.2f} GB")
    parts.append(f"ETA {eta}")
    return " | ".join(parts)
