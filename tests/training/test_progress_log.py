"""When a line is logged, the position and the remaining time in it; ranks agree on when."""

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.messages import assert_facts
from support.tiny import Tiny, recipe_of
from support.whole_runs import records
from support.workers import WorkerPool

from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError
from megatron_prealign.training import progress_log as module
from megatron_prealign.training.callbacks import Callback
from megatron_prealign.training.metrics_file import MetricsFile
from megatron_prealign.training.metrics_log import MetricsLog
from megatron_prealign.training.position import position, total_steps
from megatron_prealign.training.progress_log import ProgressLog

TOKENS_PER_STEP = 100


def phase(name: str, iters: Callable[[TrainState], int]) -> Any:
    metrics = {"loss": 1.0, "lm_loss": 1.0}
    return SimpleNamespace(
        name=name,
        total_iters=iters,
        expected_step_tokens=lambda: 0.0,
        metrics=lambda steps: dict(metrics),
        drain_waited_s=lambda: 0.0,
    )


class Run:
    """A trainer without a model: two phases, of which `step` does the next step in `seconds`."""

    def __init__(self, alignment: int, language_model: int) -> None:
        self.phases = [phase("alignment", lambda state: alignment), phase("language_model", lambda _: language_model)]
        self.state = TrainState()
        self.runtime = SimpleNamespace(rank=0, device=torch.device("cpu"))
        self.learning_rate, self.grad_norm = 1e-3, None

    @property
    def phase(self) -> Any:
        return self.phases[self.state.phase]

    def step(self, log: ProgressLog, seconds: float) -> None:
        if self.state.phase_step == self.phase.total_iters(self.state):
            log.on_phase_end(self)  # type: ignore[arg-type]
            self.state.next_phase()
        self.state.step += 1
        self.state.phase_step += 1
        self.state.tokens += TOKENS_PER_STEP
        self.state.seconds += seconds
        log.on_step(self)  # type: ignore[arg-type]


@pytest.fixture
def make_log(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, tmp_path: Path) -> Callable[[int], ProgressLog]:
    # There is no other rank.
    monkeypatch.setattr(module.dist, "broadcast", lambda tensor, src: None)
    monkeypatch.setattr(module, "max_over_ranks", lambda value, device: value)

    def make(interval: int) -> ProgressLog:
        values = tiny.values(tmp_path / "run")
        values["logging"]["log_interval"] = interval
        # The run's steps have as many tokens as those of this recipe.
        values["data"]["seq_length"] = TOKENS_PER_STEP // values["training"]["global_batch_size"]
        recipe = recipe_of(values, tmp_path)
        metrics = MetricsLog([MetricsFile(tmp_path / "metrics.jsonl")])
        return ProgressLog(recipe, metrics, padded_vocab_size=1024)

    return make


def logged_steps(directory: Path) -> list[int]:
    return [step for _, step in records(directory)]


@pytest.mark.parametrize(
    ("seconds", "interval", "steps"),
    [
        # The first step, multiples of the interval, both ends of the phases (4 and 12 steps).
        (0.1, 10, [1, 4, 5, 10, 16]),
        # Two steps of 25 s fit into a minute, counted from the last line.
        (25, 10, [1, 3, 4, 5, 7, 9, 10, 12, 14, 16]),
        (101, 1000, list(range(1, 17))),
        (0.1, 1, list(range(1, 17))),
    ],
)
def test_steps_with_a_line(
    make_log: Callable[[int], ProgressLog], tmp_path: Path, seconds: float, interval: int, steps: list[int]
) -> None:
    log, run = make_log(interval), Run(4, 12)
    log.on_start(run)  # type: ignore[arg-type]
    for _ in range(16):
        run.step(log, seconds)
    log.on_phase_end(run)  # type: ignore[arg-type]
    assert logged_steps(tmp_path) == steps


def test_position_and_time_left(make_log: Callable[[int], ProgressLog], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log, run = make_log(1000), Run(4, 12)
    log.on_start(run)  # type: ignore[arg-type]
    run.step(log, 600)
    estimate, line = caplog.messages
    # 3 steps of the phase are left, and 12 of the next one with 96 instead of 100 tokens.
    assert_facts(estimate, "first step took 10.0 min", "start-up", "0:30:00 (alignment)", "2:25:12 (run)")
    assert_facts(line, "step 1/16 (alignment 1/4)", "0:30:00 (alignment)", "2:25:12 (run)")
    for _ in range(4):
        run.step(log, 600)
    # Estimated once, from later steps; the last phase ends with the run.
    (estimate,) = (message for message in caplog.messages if "evaluations" in message)
    assert_facts(estimate, "10.0 min (step 2)", "0:20:00 (alignment)", "2:15:12 (run)")
    assert_facts(caplog.messages[-1], "step 5/16 (language_model 1/12)", "ETA 1:50:00 (run)")
    assert len(re.findall(r"\d:\d\d:\d\d", caplog.messages[-1])) == 1


def test_the_start_up_of_the_first_step_is_not_part_of_the_estimate(
    make_log: Callable[[int], ProgressLog], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log, run = make_log(4), Run(4, 12)
    log.on_start(run)  # type: ignore[arg-type]
    for seconds in (10, 1, 1, 1):
        run.step(log, seconds)
    first, _, estimate, _ = caplog.messages
    assert_facts(first, "10 s", "start-up")
    assert_facts(estimate, "about 1 s (steps 2 to 4)", "0:00:12 (run)")


def test_total_of_a_token_budget_is_projected() -> None:
    """The second phase gets what the first one leaves of 1,000 tokens: as many tokens for each of its later steps as
    for the first ones."""

    def rest(state: TrainState) -> int:
        if state.phase_start_tokens > 900:
            raise UserError("too few tokens")
        return (1000 - state.phase_start_tokens) // 100

    run = Run(4, 0)
    run.phases[1] = phase("language_model", rest)
    assert total_steps(run.phases, run.state) == 4 + 10
    run.phases[0].expected_step_tokens = lambda: 125.0
    assert total_steps(run.phases, run.state) == 4 + 5
    run.state = TrainState(step=2, phase_step=2, tokens=300)
    assert total_steps(run.phases, run.state) == 4 + 4
    assert position(run) == "step 2/8 (alignment 2/4)"  # type: ignore[arg-type]
    # Too few tokens are reported by the phase, not by a log line.
    run.state = TrainState(step=2, phase_step=2, tokens=900)
    assert total_steps(run.phases, run.state) == 4
    run.state = TrainState(phase=1, step=5, phase_step=1, tokens=700, phase_start_tokens=600)
    assert total_steps(run.phases, run.state) == 4 + 4


class DifferentClocks(Callback):
    """Steps take 25 s by rank 0's clock and 1 s by that of rank 1."""

    def on_step(self, trainer: Any) -> None:
        trainer.state.seconds += 1 if trainer.runtime.rank else 25


def train_with_different_clocks(values: dict[str, Any], directory: str) -> None:
    """Runs in workers."""
    from megatron_prealign.run.pretrain import pretrain

    pretrain(recipe_of(values, Path(directory)), leave_process_group=True, callbacks=[DifferentClocks()])


@pytest.mark.slow
def test_ranks_log_together_by_the_clock_of_rank_0(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = copy.deepcopy(tiny.values(tmp_path / "run"))
    del values["alignment"]
    values["parallel"] = {"device": "cpu"}
    values["training"]["train_iters"] = 8
    values["logging"]["log_interval"] = 5
    workers.run(2, train_with_different_clocks, values, str(tmp_path))
    # The first step takes its real time. By rank 1's clock no line would be due between 5 and 8, so ranks that disagree
    # would wait for each other.
    assert logged_steps(tmp_path / "run") == [1, 5, 7, 8]
