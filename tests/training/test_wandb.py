"""Weights & Biases: the real library offline, what it wrote read back; refusals before a run. No network."""

import json
import logging
import struct
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts, user_error
from support.tiny import Tiny, recipe_of

from megatron_prealign.doctor.checks import installed_version
from megatron_prealign.recipe import Recipe
from megatron_prealign.run.validate import validate
from megatron_prealign.training import wandb as module
from megatron_prealign.training.metrics_log import open_metrics

needs_wandb = pytest.mark.skipif(installed_version("wandb") is None, reason="wandb is not installed")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """No account and no settings of the user; offline."""
    for name in ("WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Nothing listens there, in case a test is wrong.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    yield monkeypatch
    if "wandb" in sys.modules:
        # Otherwise it keeps its settings and its process for the next test.
        sys.modules["wandb"].teardown()


def recipe_at(tiny: Tiny, run_dir: Path) -> Recipe:
    run_dir.mkdir(exist_ok=True)
    values = tiny.values(run_dir)
    values["logging"]["wandb"] = True
    return recipe_of(values, run_dir.parent)


def stored(path: Path) -> list[Any]:
    """Records of a complete offline file. The process of wandb may still write it after `finish` has returned."""
    deadline_s = time.monotonic() + 20.0
    while True:
        records = records_in(path)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline_s, f"{path} has no end"
        time.sleep(0.05)


def records_in(path: Path) -> list[Any]:
    """Records of an offline file: blocks of 32 KiB, each part with a checksum, a length and a type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        # Complete, or the last part.
        if kind in (1, 4):
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    values = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]
    return [{name: value for name, value in row.items() if not name.startswith("_")} for row in values]


@needs_wandb
def test_metrics_and_recipe_are_stored_and_a_resumed_run_is_the_same_one(
    environment: pytest.MonkeyPatch, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir, losses = tmp_path / "my_run", {}
    recipe = recipe_at(tiny, run_dir)
    # A directory that an earlier wandb left in the current one is not the package.
    (tmp_path / "wandb").mkdir()
    with caplog.at_level(logging.INFO):
        for first in (3, 2):
            metrics = open_metrics(recipe)
            for step in (first, first + 1):
                losses[first, step] = {"step": step, "language_model/loss": 10.0 * first + step}
                record = {"kind": "train", "phase": "language_model", "step": step, "phase_step": step}
                metrics.write({**record, "loss": 10.0 * first + step})
            metrics.close()
    assert not [record for record in caplog.records if record.levelno > logging.INFO], caplog.text
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    first_file, second_file = sorted(
        run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime
    )
    assert {first_file.name, second_file.name} == {f"run-{run_id}.wandb"}
    first_records, second_records = stored(first_file), stored(second_file)
    assert history(first_records) == [losses[3, 3], losses[3, 4]]
    # Repeated steps are kept, although they are lower than the last one.
    assert history(second_records) == [losses[2, 2], losses[2, 3]]
    (run,) = (record.run for record in first_records if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == (run_id, "megatron-prealign", "my_run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["logging"]["run_dir"] == str(run_dir)
    assert config["model"]["num_layers"] == recipe.model.num_layers
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 4
    assert_facts(caplog.text, "offline", "wandb sync", first_file.parent)


def test_the_id_may_be_given(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("WANDB_RUN_ID", "given")
    assert module._run_id(tmp_path) == "given"
    environment.delenv("WANDB_RUN_ID")
    assert module._run_id(tmp_path) == "given"


@needs_wandb
@pytest.mark.parametrize(
    ("mode", "facts"), [("online", ("API key", "wandb login", "WANDB_MODE=offline")), ("nonsense", ("nonsense",))]
)
def test_a_wrong_configuration_is_refused(
    environment: pytest.MonkeyPatch, tiny: Tiny, tmp_path: Path, mode: str, facts: tuple[str, ...]
) -> None:
    environment.setenv("WANDB_MODE", mode)
    with user_error("logging.wandb", *facts):
        open_metrics(recipe_at(tiny, tmp_path / "run"))


@needs_wandb
def test_an_unreachable_server_does_not_end_the_run(
    environment: pytest.MonkeyPatch, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    def unreachable(**options: Any) -> Any:
        raise wandb.errors.CommError("context deadline exceeded\nwhile retrying")

    environment.setattr(wandb, "init", unreachable)
    metrics = open_metrics(recipe_at(tiny, tmp_path / "run"))
    (message,) = caplog.messages
    assert_facts(message, "Weights & Biases", "CommError: context deadline exceeded while retrying")
    metrics.write({"kind": "train", "phase": "language_model", "step": 1, "phase_step": 1})
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_validate_reports_a_missing_package(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    values = tiny.values(tmp_path / "run")
    values["logging"]["wandb"] = True
    monkeypatch.setattr(module, "version", missing)
    # A directory of that name is not the package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    with user_error("logging.wandb", "not installed", "pip install 'megatron-prealign[wandb]'", "false"):
        validate(recipe_of(values, tmp_path))
    values["logging"]["wandb"] = False
    validate(recipe_of(values, tmp_path))
