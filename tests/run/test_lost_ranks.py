"""Training under torchrun whose processes are killed or stopped: who is named, how soon it ends, what is left."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.launched import Launched
from support.messages import assert_facts
from support.tiny import Tiny
from support.whole_runs import language_model_values, steps_in

from megatron_prealign.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ENDED_S = 60
"""Long enough for a busy machine; a run that notices nothing takes longer."""


def long_run(tiny: Tiny, run_dir: Path, **parallel: Any) -> dict[str, Any]:
    values = language_model_values(tiny, run_dir)
    values["parallel"] |= parallel
    values["training"].update(train_iters=20_000, micro_batch_size=2)
    return values


def error_of(rank: int, text: str) -> str:
    start = f"rank {rank}: " if rank else "(?!rank)"
    (line,) = re.findall(rf"^error: {start}.*", text, flags=re.MULTILINE)
    return line


def test_a_killed_rank_is_named_with_host_and_process(tiny: Tiny, tmp_path: Path) -> None:
    with Launched(long_run(tiny, tmp_path / "run"), tmp_path) as run:
        run.wait_for_steps(tmp_path / "run", 3)
        killed = run.ranks[1]
        killed.kill()
        assert run.process.wait(ENDED_S) == 1
        line = error_of(0, run.text)
        assert_facts(
            line, f"rank 1 on {run.host} (process {killed.pid})", "ended without a report", "rerun the same command"
        )
        # The block of torchrun, which comes last, contains the line too.
        assert run.text.rindex(line) > run.text.index("ChildFailedError")


def test_an_error_while_one_rank_reads_ends_all(tiny: Tiny, tmp_path: Path) -> None:
    for extension in (".bin", ".idx", ".json"):
        shutil.copy(f"{tiny.directory}/en{extension}", tmp_path)
    tokens = np.memmap(tmp_path / "en.bin", dtype=np.uint16, mode="r+")
    tokens[1000] = 60_000
    tokens.flush()
    values = long_run(tiny, tmp_path / "run")
    values["data"]["sources"][0]["path"] = str(tmp_path / "en")
    values["data"]["cache"] = str(tmp_path / "cache")
    with Launched(values, tmp_path) as run:
        run.wait_for_steps(tmp_path / "run", 1)
        assert run.process.wait(ENDED_S) == 1
        # The seed of the data and the size of microbatches make it this one.
        assert_facts(error_of(0, run.text), "60000", tmp_path / "en.bin")
        assert_facts(error_of(1, run.text), f"rank 0 on {run.host} (process {run.ranks[0].pid})", "see its output")


def test_ranks_of_a_killed_launcher_save(tiny: Tiny, tmp_path: Path) -> None:
    with Launched(long_run(tiny, tmp_path / "run"), tmp_path) as run:
        run.wait_for_steps(tmp_path / "run", 3)
        run.process.kill()
        for rank in run.ranks.values():
            rank.wait(ENDED_S)
        assert_facts(run.text, f"torchrun (process {run.process.pid}) has ended", "rerun the same command to resume")
        assert "Traceback" not in run.text
    (name,) = steps_in(tmp_path / "run")[1:]
    assert main(["checkpoint", "verify", str(tmp_path / "run" / "checkpoints" / name)]) == 0


def test_a_stopped_rank_is_named_after_the_timeout(tiny: Tiny, tmp_path: Path) -> None:
    with Launched(long_run(tiny, tmp_path / "run", distributed_timeout_minutes=0.1), tmp_path) as run:
        run.wait_for_steps(tmp_path / "run", 3)
        stopped = run.ranks[1]
        stopped.suspend()
        run.wait_for(lambda: "error: " in run.text, ENDED_S)
        assert_facts(error_of(0, run.text), f"rank 1 on {run.host} (process {stopped.pid})", "SIGSTOP", "6000ms")
        assert f"no sign of life for 3 s: rank 1 on {run.host}" in run.text
