"""Costs: parts of the tokens by hand, reasons instead of zeros, ratios seed by seed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts
from support.study_records import evaluation, study_of, write_metrics
from support.tiny import Tiny, recipe_of

from megatron_prealign.evaluation.run_record import load_run
from megatron_prealign.recipe import AlignmentGuardSection, Recipe
from megatron_prealign.study.cost import (
    ALIGNMENT_SAMPLES,
    ALIGNMENT_WORDS,
    GUARD_WORDS,
    LANGUAGE_MODEL_SAMPLES,
    MEMORY,
    PARTS,
    SECONDS,
    TOKENS,
    cost_table,
    read_cost,
    token_parts,
)
from megatron_prealign.study.definition import StudyRun
from megatron_prealign.study.matrix import Job
from megatron_prealign.study.results import Row


@pytest.fixture
def recipe(tiny: Tiny, tmp_path: Path) -> Recipe:
    """With an alignment phase and a guard."""
    return replace(
        recipe_of(tiny.values(tmp_path / "run"), tmp_path), alignment_guard=AlignmentGuardSection(interval=2)
    )


def state(length: int, **counters: int) -> dict[str, Any]:
    """Content of state.json: 10 samples and 70 words of alignment, 30 more samples and 21 words of the guard."""
    values = {
        **{"phase": 1, "phase_step": 5, "step": 9, "tokens": 40 * length + 91, "phase_start_tokens": 10 * length + 70},
        **{"consumed_samples": 40, "phase_start_samples": 10, "phase_done": False, "below_floor": False},
        **counters,
    }
    return {"phase": "language_model", "train_state": {**values, "seconds": 3.0}}


def test_parts_add_up(recipe: Recipe) -> None:
    length = recipe.data.seq_length
    values, absent = token_parts(recipe, state(length))
    assert values == {
        ALIGNMENT_SAMPLES: 10 * length,
        ALIGNMENT_WORDS: 70,
        GUARD_WORDS: 21,
        LANGUAGE_MODEL_SAMPLES: 30 * length,
    }
    assert absent == {}
    assert sum(values.values()) == state(length)["train_state"]["tokens"]


def test_what_a_run_does_not_have_is_absent_with_its_reason(recipe: Recipe) -> None:
    length = recipe.data.seq_length
    joint = replace(recipe, alignment=None, alignment_guard=None)
    counters = {"tokens": 40 * length, "phase_start_tokens": 0, "phase_start_samples": 0}
    values, absent = token_parts(joint, state(length, **counters))
    assert values == {LANGUAGE_MODEL_SAMPLES: 40 * length}
    assert set(absent) == {ALIGNMENT_SAMPLES, ALIGNMENT_WORDS, GUARD_WORDS}
    assert_facts(absent[GUARD_WORDS], "no alignment guard")
    # A guard or a phase that the recipe does not have, or samples of another length.
    for wrong in (
        joint,
        replace(recipe, alignment_guard=None),
        replace(recipe, data=replace(recipe.data, seq_length=length * 2)),
    ):
        values, absent = token_parts(wrong, state(length))
        assert (values, set(absent)) == ({}, set(PARTS))
    values, absent = token_parts(recipe, {**state(length), "phase": "alignment"})
    assert values == {} and "alignment" in absent[GUARD_WORDS]
    del counters["tokens"]
    values, absent = token_parts(recipe, {"phase": "language_model", "train_state": {}})
    assert values == {} and "train_state" in absent[GUARD_WORDS]
    others = replace(recipe, checkpoint=replace(recipe.checkpoint, load="x", load_parts="all"))
    values, absent = token_parts(others, state(length))
    assert values == {} and "checkpoint.load" in absent[GUARD_WORDS]


def test_costs_of_a_job(recipe: Recipe, tmp_path: Path) -> None:
    job = Job("a", 1, recipe, tmp_path / "a.yaml", tmp_path / "run")
    train = {"kind": "train", "phase": "language_model", "phase_step": 1, "loss": 1.0, "seconds": 1.0}
    lines = [{**train, "step": step, "tokens": step, "memory_gb": memory} for step, memory in ((1, 0.5), (2, 0.75))]
    write_metrics(job.directory, [*lines, evaluation(1000, {"en": 1.0})])
    cost = read_cost(job, load_run(job.directory))
    assert cost.values == {SECONDS: 10.0, TOKENS: 1000.0, MEMORY: 0.75}
    assert cost.unknown == dict.fromkeys(PARTS, "no checkpoint")
    write_metrics(job.directory, [evaluation(1000, {"en": 1.0})])
    cost = read_cost(job, load_run(job.directory))
    assert MEMORY not in cost.values and "memory_gb" in cost.unknown[MEMORY]


def test_table(tmp_path: Path) -> None:
    study = study_of(tmp_path, [StudyRun(name="joint"), StudyRun(name="aligned"), StudyRun(name="lost")])
    seconds = {"joint": (100.0, 200.0), "aligned": (150.0, 200.0)}
    rows = [
        Row(run, seed, SECONDS, "", "", value)
        for run, values in seconds.items()
        for seed, value in enumerate(values, start=1)
    ]
    rows += [Row("aligned", 1, ALIGNMENT_WORDS, "", "", 132196.0)]
    unknown = {("joint", 1): {MEMORY: "not logged"}, ("joint", 2): {MEMORY: "not logged"}, ("aligned", 1): {}}
    table = cost_table(study, rows, unknown)
    found = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert found["joint"]["seconds"] == "150.0 ± 70.7"
    # 1.5 and 1.0, and not 175 / 150.
    assert found["aligned"]["seconds / joint"] == "1.25 ± 0.35"
    assert found["aligned"]["alignment words"] == "132,196 (1 of 2 seeds)"
    assert set(found["lost"].values()) == {"lost", "-"}
    assert found["joint"]["memory, GB"] == "-"
    assert_facts(table.caption, "same load", f"{MEMORY} (not logged): joint.")
    assert json.dumps(table.caption).count("joint") == 1
