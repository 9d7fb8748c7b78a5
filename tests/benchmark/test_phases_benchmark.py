"""`benchmark phases`: both phases of a recipe, step by step, on one and two processes."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts, assert_refused
from support.tiny import Tiny, recipe_of
from support.workers import WorkerError, WorkerPool

from megatron_prealign.cli import main

LM_TOKENS = 8 * 32


def measured(values: dict[str, Any], directory: str, steps: int) -> list[Any]:
    """Runs in workers."""
    from megatron_prealign.benchmark.phases import measure_phases
    from megatron_prealign.runtime.distributed import running

    recipe = recipe_of(values, Path(directory))
    with running(recipe.parallel, seed=1, leave_process_group=True) as runtime:
        return measure_phases(recipe, runtime, steps=steps, warmup=1)


def values_for(tiny: Tiny, directory: Path) -> dict[str, Any]:
    values = tiny.values(directory)
    # None of these may run or interfere with two steps.
    values["optimizer"]["lr_warmup_iters"] = 3
    values["alignment"]["lr_warmup_iters"] = 3
    values["alignment_watch"] = {"interval": 1}
    values["alignment_guard"] = {"interval": 1}
    values["checkpoint"] = {"save_interval": 1}
    return values


@pytest.mark.parametrize("processes", [1, 2])
def test_both_phases_are_measured_and_no_files_remain(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, processes: int
) -> None:
    run_dir = tmp_path / "run"
    results = workers.run(processes, measured, values_for(tiny, run_dir), str(tmp_path), 2)
    alignment, language_model = results[0]
    assert (alignment.phase, language_model.phase) == ("alignment", "language_model")
    assert (alignment.steps, alignment.processes) == (2, processes)
    assert language_model.tokens_per_step == LM_TOKENS
    # 4 samples, and 32 words of at least one token.
    assert alignment.tokens_per_step >= 4 * 32 + 32
    assert language_model.share_of_language_model == 1.0
    assert alignment.share_of_language_model == alignment.tokens_per_second / language_model.tokens_per_second
    assert not run_dir.exists()


def test_a_recipe_without_alignment_is_a_user_error(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = tiny.values(tmp_path)
    del values["alignment"]
    with pytest.raises(WorkerError) as caught:
        workers.run(1, measured, values, str(tmp_path), 1)
    kind, message, _ = caught.value.failures[0]
    assert kind == "UserError"
    assert_facts(message, "alignment is null", "section alignment")


@pytest.mark.slow
def test_command_writes_a_row_per_phase(tiny: Tiny, tmp_path: Path) -> None:
    output, recipe = tmp_path / "phases.csv", tmp_path / "recipe.yaml"
    values = values_for(tiny, tmp_path / "run")
    values["parallel"] = {"device": "cpu"}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    arguments = ["--config", str(recipe), "--steps", "2", "--warmup", "0", "--output", str(output)]
    command = [sys.executable, "-m", "megatron_prealign", "benchmark", "phases", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(output.open(encoding="utf-8")))
    assert [row["phase"] for row in rows] == ["alignment", "language_model"]
    for row in rows:
        assert row["phase"] in done.stdout
        assert float(row["tokens_per_second"]) > 0
        assert row["torch"]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--steps", "0"], ("--steps is 0", "--warmup is 5", "at least 1")),
        (["--warmup", "-1"], ("--steps is 20", "--warmup is -1", "at least 0")),
        (["--output", "/no/such/directory/x.csv"], ("--output /no/such/directory/x.csv", "not an existing directory")),
    ],
)
def test_invalid_options(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], facts: tuple[str, ...]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.values(tmp_path / "run")), encoding="utf-8")
    status = main(["benchmark", "phases", "--config", str(recipe), *arguments])
    assert_refused(status, capsys.readouterr().err, *facts)
