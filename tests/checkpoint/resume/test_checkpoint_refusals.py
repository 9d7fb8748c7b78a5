"""Corrupt or incompatible checkpoints: every rank ends with the same one-line error and changes nothing."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.marks import slow_except
from support.messages import assert_facts
from support.tiny import Tiny
from support.whole_runs import language_model_values, records, refusal, reseal, run, train
from support.workers import WorkerPool

STEPS = 2


def values_for(tiny: Tiny, directory: Path, **checkpoint: Any) -> dict[str, Any]:
    """Two steps of language-model training, without alignment."""
    values = language_model_values(tiny, directory, **{"save_interval": 1, "keep": 9, **checkpoint})
    values["training"]["train_iters"] = STEPS
    return values


@pytest.fixture(scope="module")
def trained(workers: WorkerPool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two processes whose newest checkpoint is of step 1. Tests copy it."""
    directory = tmp_path_factory.mktemp("trained")
    run(workers, 2, values_for(tiny, directory), directory)
    shutil.rmtree(directory / "checkpoints" / "step_00000002")
    (directory / "checkpoints" / "latest").write_text("step_00000001\n")
    (directory / "metrics.jsonl").unlink()
    return directory


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path, dirs_exist_ok=True))


def zeros_from(file: Path, start: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:start] + bytes(len(data) - start))


def zero_data(checkpoint: Path) -> str:
    for file in checkpoint.glob("*.distcp"):
        zeros_from(file, 0)
    return "UnpicklingError"


def cut_data(checkpoint: Path) -> str:
    file = max(checkpoint.glob("*.distcp"), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    return f"{file.name} has {size - 1} bytes, expected {size}"


def drop_common(checkpoint: Path) -> str:
    (checkpoint / "common.pt").unlink()
    return "common.pt is missing"


def cut_metadata(checkpoint: Path) -> str:
    file = checkpoint / ".metadata"
    file.write_bytes(file.read_bytes()[:100])
    return "UnpicklingError: pickle exhausted before end of frame"


def clear_metadata(checkpoint: Path) -> str:
    (checkpoint / ".metadata").write_bytes(b"")
    return "EOFError"


class Harmful:
    """Its pickle creates a directory when it is loaded."""

    def __init__(self, checkpoint: Path) -> None:
        self._target = str(checkpoint / "harm")

    def __reduce__(self) -> Any:
        return os.mkdir, (self._target,)


def harmful_metadata(checkpoint: Path) -> str:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Harmful(checkpoint)))
    return f"{os.mkdir.__module__}.mkdir"


def harmful_common(checkpoint: Path) -> str:
    torch.save({"optimizer": Harmful(checkpoint)}, checkpoint / "common.pt")
    return "UnpicklingError"


@pytest.mark.parametrize(
    "damage",
    slow_except(
        [zero_data, cut_data, drop_common, cut_metadata, clear_metadata, harmful_metadata, harmful_common],
        cut_data,
        harmful_metadata,
    ),
)
def test_corruption_is_one_line(workers: WorkerPool, tiny: Tiny, copied: Path, damage: Callable[[Path], str]) -> None:
    """Corruption that the manifest does not show: it was written this way, or only the sizes were compared."""
    checkpoint = copied / "checkpoints" / "step_00000001"
    expected = damage(checkpoint)
    reseal(checkpoint)
    message = refusal(workers, train, values_for(tiny, copied, verify="sizes"), str(copied))
    assert_facts(message, f"cannot read {checkpoint}", expected, "checkpoint.verify", "checksums")
    assert not (checkpoint / "harm").exists()


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {key: value for key, value in state.items() if key != name}


STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], tuple[str, ...]]] = {
    "empty": (lambda state: {}, ("kind", "'missing'", "run or weights")),
    "no model": (without("model"), ("model", "'missing'", "expected dict")),
    "no run": (lambda state: {**state, "run": {}}, ("run", "phases, code_switch, switching, seq_length")),
    "sources": (lambda state: {**state, "run": {**state["run"], "sources": [1]}}, ("run.sources", "1, expected")),
    "budget": (lambda state: {**state, "run": {**state["run"], "budget": {}}}, ("run.budget is {}",)),
    "blend": (lambda state: {**state, "blend": {}}, ("blend", "KeyError: 'start'")),
    "counters": (lambda state: {**state, "train_state": {"step": 1}}, ("train_state", "phase_step")),
    "text": (
        lambda state: {**state, "train_state": {**state["train_state"], "tokens": "9"}},
        ("train_state.tokens is '9'",),
    ),
}


@pytest.mark.parametrize("case", STATES)
def test_corrupt_state_is_one_line(workers: WorkerPool, tiny: Tiny, copied: Path, case: str) -> None:
    file = copied / "checkpoints" / "step_00000001" / "state.json"
    change, facts = STATES[case]
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    reseal(file.parent)
    message = refusal(workers, train, values_for(tiny, copied), str(copied))
    assert_facts(message, f"{file} is corrupt", *facts)


@pytest.mark.parametrize(
    ("section", "field", "value", "expected"),
    slow_except(
        [
            ("parallel", "use_distributed_optimizer", False, "parallel.use_distributed_optimizer True (recipe: False)"),
            ("training", "precision", "bf16", "training.precision fp32 (recipe: bf16)"),
            ("training", "seed", 4, "training.seed 3 (recipe: 4)"),
            ("data", "seq_length", 16, "data.seq_length 32 (recipe: 16)"),
        ],
        ("training", "seed", 4, "training.seed 3 (recipe: 4)"),
    ),
)
def test_another_recipe_is_refused_and_not_recorded(
    workers: WorkerPool, tiny: Tiny, copied: Path, section: str, field: str, value: object, expected: str
) -> None:
    (copied / "versions.json").write_text('{"megatron-prealign": "another"}')
    before = {name: (copied / name).read_bytes() for name in ("recipe.yaml", "versions.json")}
    values = values_for(tiny, copied)
    values[section][field] = value
    assert expected in refusal(workers, train, values, str(copied))
    assert {name: (copied / name).read_bytes() for name in before} == before
    # The original recipe resumes.
    run(workers, 2, values_for(tiny, copied), copied)
    assert [step for _, step in records(copied)] == [2]
    assert json.loads((copied / "versions.json").read_text())["megatron-prealign"] != "another"


@pytest.mark.slow
def test_alignment_added_later_does_not_shift_the_phase(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    """With train_tokens the blend keeps its samples when an alignment section is added."""
    values = values_for(tiny, tmp_path)
    del values["training"]["train_iters"]
    # Enough for 5 alignment steps of 4 samples and 3 language-model steps of 8, with 32 tokens each.
    values["training"]["train_tokens"] = (5 * 4 + 3 * 8) * 32
    run(workers, 2, values, tmp_path)
    last = max(step for _, step in records(tmp_path))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "latest").write_text(f"step_{last - 1:08d}\n")
    (tmp_path / "metrics.jsonl").unlink()
    values["alignment"] = tiny.values(tmp_path)["alignment"]
    run(workers, 2, values, tmp_path)
    assert list(records(tmp_path)) == [("language_model", last)]


@pytest.mark.slow
def test_steps_of_an_abandoned_branch_do_not_displace_new_ones(workers: WorkerPool, tiny: Tiny, copied: Path) -> None:
    checkpoints = copied / "checkpoints"
    for name in ("step_00000002", "step_00000008", ".step_00000099.incomplete"):
        shutil.copytree(checkpoints / "step_00000001", checkpoints / name)
    run(workers, 2, values_for(tiny, copied, keep=2), copied)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000001", "step_00000002"]
    state = json.loads((checkpoints / "step_00000002" / "state.json").read_text())
    assert state["train_state"]["step"] == 2


def test_only_tokenizer_files_are_copied(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    directory = tmp_path / "tokenizer_and_model"
    shutil.copytree(tiny.tokenizer, directory)
    own = {file.name for file in directory.iterdir()} - {"fertility.json"}
    for name in ("model.safetensors", "pytorch_model.bin", "config.json"):
        (directory / name).write_bytes(b"weights")
    values = values_for(tiny, tmp_path)
    values["data"]["tokenizer"] = str(directory)
    run(workers, 1, values, tmp_path)
    copies = {file.name for file in (tmp_path / "checkpoints" / "step_00000002" / "tokenizer").iterdir()}
    assert copies == own


@pytest.mark.slow
def test_device_is_part_of_the_layout(workers: WorkerPool, tiny: Tiny, copied: Path) -> None:
    """Random states of a GPU cannot be restored on a CPU: such a checkpoint counts as one of another layout."""
    file = copied / "checkpoints" / "step_00000001" / "state.json"
    state = json.loads(file.read_text())
    assert state["layout"]["device"] == "cpu"
    state["layout"]["device"] = "cuda"
    file.write_text(json.dumps(state))
    reseal(file.parent)
    [(random_states_read, step), _] = workers.run(2, train_and_count_restores, values_for(tiny, copied), str(copied))
    assert (random_states_read, step) == (0, 2)


def train_and_count_restores(values: dict[str, Any], directory: str) -> tuple[int, int]:
    """Runs in workers: number of times that random states were restored, and the last step."""
    from megatron_prealign.runtime import random_state

    real, restored = random_state.restore, []
    random_state.restore = lambda states: restored.append(states)
    try:
        step = train(values, directory)["step"]
        return len(restored), step
    finally:
        random_state.restore = real
