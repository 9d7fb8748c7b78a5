"""`benchmark data-wait`: both ways of reading the samples of a slow disk."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts, assert_refused
from support.tiny import Tiny
from support.workers import WorkerPool

from megatron_prealign.cli import main

PAUSE_MS, SAMPLES = 5.0, 8


def commanded(arguments: list[str]) -> tuple[int, str]:
    """Runs in a worker: exit status and output of a command."""
    import io
    from contextlib import redirect_stdout

    from megatron_prealign.runtime import distributed

    # The process group belongs to the worker.
    stop = distributed.stop
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as output:
        patch.setattr(distributed, "stop", lambda **keywords: stop(leave_process_group=True))
        return main(["benchmark", "data-wait", *arguments]), output.getvalue()


@pytest.mark.slow
def test_command_writes_a_row_per_way_of_reading(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    output, recipe = tmp_path / "data_wait.csv", tmp_path / "recipe.yaml"
    values = tiny.values(tmp_path / "run")
    values["parallel"] = {"device": "cpu"}
    # None of these may run or interfere.
    values["optimizer"]["lr_warmup_iters"] = 3
    values["alignment_watch"] = {"interval": 1}
    values["alignment_guard"] = {"interval": 1}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    options = ["--pause-ms", str(PAUSE_MS), "--steps", "6", "--warmup", "1", "--output", str(output)]
    ((status, printed),) = workers.run(1, commanded, ["--config", str(recipe), *options])
    assert status == 0
    rows = list(csv.DictReader(output.open(encoding="utf-8")))
    assert [row["reading"] for row in rows] == ["on demand", "ahead"]
    for row in rows:
        assert_facts(printed, row["reading"], f"{float(row['ms_per_step']):,.1f}")
        assert (row["processes"], row["samples_per_process"], float(row["pause_ms"])) == ("1", str(SAMPLES), PAUSE_MS)
        assert float(row["ms_per_step"]) > float(row["wait_ms"])
        assert row["torch"]
    # Every sample of the step was waited for.
    assert float(rows[0]["wait_ms"]) >= SAMPLES * PAUSE_MS
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--steps", "0"], ("--steps is 0", "--warmup is 1", "at least 1")),
        (["--warmup", "0"], ("--steps is 20", "--warmup is 0", "at least 1")),
        (["--pause-ms", "-1"], ("--pause-ms is -1", "0 to 60000")),
        (["--pause-ms", ".nan"], ("--pause-ms", "nan")),
        (["--output", "/no/such/directory/x.csv"], ("--output /no/such/directory/x.csv", "not an existing directory")),
    ],
)
def test_invalid_options(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], facts: tuple[Any, ...]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny.values(tmp_path / "run")), encoding="utf-8")
    status = main(["benchmark", "data-wait", "--config", str(recipe), *arguments])
    assert_refused(status, capsys.readouterr().err, *facts)
