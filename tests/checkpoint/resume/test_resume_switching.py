"""A resumed run switches the words that it switched before: the same dictionary, the same measured share of words."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny import Tiny, recipe_of
from support.whole_runs import language_model_values, refusal, train
from support.workers import WorkerPool

from megatron_prealign.dictionary.table import load_table

# No share that could be measured, so that a later run's can be told from it.
SHARE = {"en": 0.4375, "en_clone": 0.0}


def values_for(tiny: Tiny, directory: Path) -> dict[str, Any]:
    """Language-model training alone, two steps."""
    values = language_model_values(tiny, directory, save_interval=1, keep=9)
    values["training"]["train_iters"] = 2
    return values


def train_with_share(values: dict[str, Any], directory: str, share: dict[str, float]) -> tuple[int, list[Any]]:
    """Runs in a worker: how often this rank measured, and the thresholds that the run switched with."""
    from megatron_prealign.code_switch.switcher import CodeSwitcher
    from megatron_prealign.run import inputs
    from megatron_prealign.run import pretrain as module

    measured = []
    made: list[CodeSwitcher] = []
    measure, switcher = inputs.blend_coverage, module.CodeSwitcher

    def counted(*arguments: Any) -> dict[str, float]:
        measured.append(arguments)
        return share

    def kept(*arguments: Any, **named: Any) -> CodeSwitcher:
        made.append(switcher(*arguments, **named))
        return made[-1]

    inputs.blend_coverage, module.CodeSwitcher = counted, kept
    try:
        module.pretrain(recipe_of(values, Path(directory)), leave_process_group=True)
    finally:
        inputs.blend_coverage, module.CodeSwitcher = measure, switcher
    return len(measured), made[0]._thresholds.tolist()


def words_values(tiny: Tiny, directory: Path) -> dict[str, Any]:
    values = values_for(tiny, directory)
    values["code_switch"] = {"ratio": 0.1, "ratio_of": "words"}
    return values


def go_back(directory: Path) -> dict[str, Any]:
    """Makes step 1 the newest; returns its state."""
    shutil.rmtree(directory / "checkpoints" / "step_00000002")
    (directory / "checkpoints" / "latest").write_text("step_00000001\n")
    return json.loads((directory / "checkpoints" / "step_00000001" / "state.json").read_text())


def test_share_of_words_is_measured_once_and_kept(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = words_values(tiny, tmp_path)
    (first, thresholds), (second, same) = workers.run(2, train_with_share, values, str(tmp_path), SHARE)
    # Rank 0 alone measured, both have it.
    assert (first, second) == (1, 0)
    assert thresholds == same
    assert thresholds[0][1] == pytest.approx(0.1 / SHARE["en"] * 2**32, rel=1e-6)
    assert go_back(tmp_path)["run"]["switching"]["coverage"] == SHARE
    # The data looks otherwise now, which changes nothing.
    others = workers.run(2, train_with_share, values, str(tmp_path), {"en": 0.9, "en_clone": 0.0})
    assert others == [(0, thresholds)] * 2
    # Other words are known: what was measured does not hold for them.
    go_back(tmp_path)
    values["code_switch"]["min_word_length"] = 5
    (first, moved), (second, _) = workers.run(
        2, train_with_share, values, str(tmp_path), {"en": 0.875, "en_clone": 0.0}
    )
    assert (first, second) == (1, 0)
    assert moved[0][1] == pytest.approx(0.1 / 0.875 * 2**32, rel=1e-6)


def test_another_dictionary_is_refused(workers: WorkerPool, tiny: Tiny, tmp_path: Path) -> None:
    values = values_for(tiny, tmp_path)
    workers.run(2, train, values, str(tmp_path))
    go_back(tmp_path)
    table = load_table(tiny.table)
    weights = table.candidate_weight.copy()
    weights[-1] *= 2
    other = copy.deepcopy(values)
    other["dictionary"]["table"] = str(tmp_path / "other.safetensors")
    table.candidate_weight[:] = weights
    table.save(other["dictionary"]["table"])
    message = refusal(workers, train, other, str(tmp_path))
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    assert message.startswith(f"{checkpoint} cannot go on with the dictionary table {tmp_path / 'other.safetensors'}, ")
    assert "blake2b:" in message and "or set checkpoint.directory" in message
    held_out = copy.deepcopy(values)
    held_out["dictionary"]["held_out_fraction"] = 0.5
    assert "dictionary.held_out_fraction as they were" in refusal(workers, train, held_out, str(tmp_path))
    # The same table elsewhere is the same.
    moved = copy.deepcopy(values)
    moved["dictionary"]["table"] = shutil.copy(tiny.table, tmp_path / "moved.safetensors")
    moved["dictionary"]["table"] = str(moved["dictionary"]["table"])
    assert workers.run(2, train, moved, str(tmp_path))[0]["step"] == 2
