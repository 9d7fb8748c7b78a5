"""A resumed run switches the same words: the same dictionary, the same measured coverage."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts
from support.tiny import Tiny, recipe_of
from support.whole_runs import language_model_values, refusal, train
from support.workers import WorkerPool

from megatron_prealign.dictionary.table import load_table

# Differs from any coverage that could be measured.
COVERAGE = {"en": 0.4375, "en_clone": 0.0}


def values_for(tiny: Tiny, directory: Path) -> dict[str, Any]:
    """Two steps of language-model training, without alignment."""
    values = language_model_values(tiny, directory, save_interval=1, keep=9)
    values["training"]["train_iters"] = 2
    return values


def train_with_coverage(values: dict[str, Any], directory: str, coverage: dict[str, float]) -> tuple[int, list[Any]]:
    """Runs in a worker: number of measurements on this rank, and the switching thresholds of the run."""
    from megatron_prealign.code_switch.switcher import CodeSwitcher
    from megatron_prealign.run import inputs
    from megatron_prealign.run import pretrain as module

    measured = []
    created: list[CodeSwitcher] = []
    measure, switcher = inputs.blend_coverage, module.CodeSwitcher

    def fake_coverage(*arguments: Any) -> dict[str, float]:
        measured.append(arguments)
        return coverage

    def recording_switcher(*arguments: Any, **named: Any) -> CodeSwitcher:
        created.append(switcher(*arguments, **named))
        return created[-1]

    inputs.blend_coverage, module.CodeSwitcher = fake_coverage, recording_switcher
    try:
        module.pretrain(recipe_of(values, Path(directory)), leave_process_group=True)
    finally:
        inputs.blend_coverage, module.CodeSwitcher = measure, switcher
    return len(measured), created[0]._thresholds.tolist()


def words_values(tiny: Tiny, directory: Path) -> dict[str, Any]:
    values = values_for(tiny, directory)
    values["code_switch"] = {"ratio": 0.1, "ratio_of": "words"}
    return values


def roll_back(directory: Path) -> dict[str, Any]:
    """Makes step 1 the newest checkpoint; returns its state."""
    shutil.rmtree(directory / "checkpoints" / "step_00000002")
    (directory / "checkpoints" / "latest").write_text("step_00000001\n")
    return json.loads((directory / "checkpoints" / "step_00000001" / "state.json").read_text())


@pytest.mark.slow
def test_coverage_is_measured_once_and_kept(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = words_values(tiny, tmp_path)
    (first, thresholds), (second, same) = workers.run(2, train_with_coverage, values, str(tmp_path), COVERAGE)
    # Only rank 0 measured; both have the result.
    assert (first, second) == (1, 0)
    assert thresholds == same
    assert thresholds[0][1] == pytest.approx(0.1 / COVERAGE["en"] * 2**32, rel=1e-6)
    assert roll_back(tmp_path)["run"]["switching"]["coverage"] == COVERAGE
    # A different coverage of the data changes nothing.
    others = workers.run(2, train_with_coverage, values, str(tmp_path), {"en": 0.9, "en_clone": 0.0})
    assert others == [(0, thresholds)] * 2
    # With other words the coverage is measured again.
    roll_back(tmp_path)
    values["code_switch"]["min_word_length"] = 5
    (first, moved), (second, _) = workers.run(
        2, train_with_coverage, values, str(tmp_path), {"en": 0.875, "en_clone": 0.0}
    )
    assert (first, second) == (1, 0)
    assert moved[0][1] == pytest.approx(0.1 / 0.875 * 2**32, rel=1e-6)


@pytest.mark.slow
def test_another_dictionary_is_refused(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(tiny, tmp_path)
    workers.run(2, train, values, str(tmp_path))
    roll_back(tmp_path)
    table = load_table(tiny.table)
    weights = table.candidate_weight.copy()
    weights[-1] *= 2
    other = copy.deepcopy(values)
    other["dictionary"]["table"] = str(tmp_path / "other.safetensors")
    table.candidate_weight[:] = weights
    table.save(other["dictionary"]["table"])
    message = refusal(workers, train, other, str(tmp_path))
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    assert_facts(message, checkpoint, f"dictionary table {tmp_path / 'other.safetensors'}", "blake2b:")
    assert_facts(message, "dictionary.table", "checkpoint.directory")
    held_out = copy.deepcopy(values)
    held_out["dictionary"]["held_out_fraction"] = 0.5
    assert_facts(refusal(workers, train, held_out, str(tmp_path)), checkpoint, "dictionary.held_out_fraction")
    # A moved table is the same.
    moved = copy.deepcopy(values)
    moved["dictionary"]["table"] = shutil.copy(tiny.table, tmp_path / "moved.safetensors")
    moved["dictionary"]["table"] = str(moved["dictionary"]["table"])
    assert workers.run(2, train, moved, str(tmp_path))[0]["step"] == 2
