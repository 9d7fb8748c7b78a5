"""A run goes on only from a checkpoint of the same phases, numbers and order of data."""

import copy
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import Tiny, recipe_of

from megatron_prealign.checkpoint.resume.identity import (
    check_run,
    code_switch_fingerprint,
    find_switching_problem,
    resume_fingerprint,
    saved_coverage,
)
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CodeSwitchSection

CHECKPOINT = Path("run/checkpoints/step_00000007")
PHASES = ["alignment", "language_model"]


@pytest.fixture
def facts(tmp_path: Path) -> dict[str, Any]:
    recipe = recipe_of(Tiny(tmp_path).values(tmp_path), tmp_path)
    assert recipe.code_switch is not None
    switching = code_switch_fingerprint("table", recipe.code_switch, digest="d1", coverage={"en": 0.5})
    return resume_fingerprint(recipe, num_samples=60, keys=[0, 1], segmenters=[None, "jieba"], switching=switching)


def summary_of(facts: dict[str, Any], phase: str = "language_model", **counters: int) -> dict[str, Any]:
    state = TrainState(consumed_samples=24, **counters).to_dict()
    return {"run": copy.deepcopy(facts), "phase": phase, "train_state": state}


@pytest.mark.parametrize(
    ("saved", "mine", "phase", "position"),
    [
        (PHASES, PHASES, "alignment", 0),
        (PHASES, PHASES, "language_model", 1),
        # With train_tokens the rows stay the same when the section comes or goes.
        (["language_model"], PHASES, "language_model", 1),
        (PHASES, ["language_model"], "language_model", 0),
    ],
)
def test_phase_is_found_by_its_name(
    facts: dict[str, Any], saved: list[str], mine: list[str], phase: str, position: int
) -> None:
    summary = summary_of({**facts, "phases": saved}, phase)
    assert check_run(CHECKPOINT, summary, {**facts, "phases": mine}) == position


def test_phase_that_the_recipe_lacks_is_refused(facts: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        check_run(CHECKPOINT, summary_of(facts, "alignment"), {**facts, "phases": ["language_model"]})
    assert str(caught.value).startswith(
        f"{CHECKPOINT} was saved in phase alignment, which the recipe does not have (it has language_model); "
    )


@pytest.mark.parametrize(
    ("name", "saved", "mine", "expected"),
    [
        ("seq_length", 32, 64, "data.seq_length 32 (recipe: 64)"),
        ("reset_position_ids", False, True, "data.reset_position_ids False (recipe: True)"),
        ("reset_attention_mask", False, True, "data.reset_attention_mask False (recipe: True)"),
        ("precision", "fp32", "bf16", "training.precision fp32 (recipe: bf16)"),
        ("use_distributed_optimizer", True, False, "parallel.use_distributed_optimizer True (recipe: False)"),
        ("seed", 3, 4, "training.seed 3 (recipe: 4)"),
    ],
)
def test_difference_is_named_with_both_values(
    facts: dict[str, Any], name: str, saved: object, mine: object, expected: str
) -> None:
    assert facts[name] == saved
    with pytest.raises(UserError) as caught:
        check_run(CHECKPOINT, summary_of(facts), {**facts, name: mine})
    message = str(caught.value)
    assert message.startswith(f"{CHECKPOINT} cannot go on with this recipe")
    assert expected in message
    assert message.count("(recipe:") == 1
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("training.train_iters", 9, "training.train_iters 5 -> 9"),
        ("training.train_iters", 3, "training.train_iters 5 -> 3"),
        ("training.global_batch_size", 16, "training.global_batch_size 8 -> 16"),
    ],
)
def test_a_run_may_become_longer_or_shorter(
    facts: dict[str, Any], caplog: pytest.LogCaptureFixture, field: str, value: int, expected: str
) -> None:
    mine = copy.deepcopy(facts)
    mine["budget"][field] = value
    with caplog.at_level(logging.WARNING):
        assert check_run(CHECKPOINT, summary_of(facts, phase_step=3), mine) == 1
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{expected} since {CHECKPOINT} was saved: steps and the learning-rate ")


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"training.train_iters": 2}, "training.train_iters is 2, of which 3 are done; "),
        # 16 rows of 32 tokens in this phase, behind 100 tokens of the one before it.
        (
            {"training.train_iters": None, "training.train_tokens": 611},
            "training.train_tokens is 611, of which 612 are done; ",
        ),
    ],
)
def test_a_run_does_not_become_shorter_than_it_is(facts: dict[str, Any], budget: dict[str, int], expected: str) -> None:
    mine = copy.deepcopy(facts)
    mine["budget"].update(budget)
    summary = summary_of(facts, phase_step=3, phase_start_samples=8, phase_start_tokens=100)
    with pytest.raises(UserError) as caught:
        check_run(CHECKPOINT, summary, mine)
    assert str(caught.value).startswith(f"{CHECKPOINT} cannot go on with this recipe: {expected}raise it")
    for name, value in budget.items():
        mine["budget"][name] = None if value is None else value + 1
    assert check_run(CHECKPOINT, summary, mine) == 1


def test_the_alignment_phase_does_not_become_shorter_than_it_is(
    facts: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    mine = copy.deepcopy(facts)
    mine["budget"]["alignment.train_iters"] = 2
    with pytest.raises(UserError) as caught:
        check_run(CHECKPOINT, summary_of(facts, "alignment", phase_step=3), mine)
    assert str(caught.value).startswith(
        f"{CHECKPOINT} cannot go on with this recipe: alignment.train_iters is 2, of which 3 are done; raise it"
    )
    with caplog.at_level(logging.WARNING):
        # Behind its end it does not matter.
        assert check_run(CHECKPOINT, summary_of(facts, phase_step=3), mine) == 1
        assert caplog.text == ""
        assert check_run(CHECKPOINT, summary_of(facts, "alignment", phase_step=2), mine) == 0
    saved = facts["budget"]["alignment.train_iters"]
    assert f"alignment.train_iters {saved} -> 2 since {CHECKPOINT} was saved" in caplog.text


def test_order_of_the_sources_does_not_confuse_their_segmenters(facts: dict[str, Any]) -> None:
    mine = copy.deepcopy(facts)
    mine["sources"].reverse()
    assert check_run(CHECKPOINT, summary_of(facts), mine) == 1
    # A source that is new has no segmenter to keep.
    mine["sources"].append({"key": 2, "path": "new", "language": "zh", "weight": 1.0, "segmenter": "jieba"})
    assert check_run(CHECKPOINT, summary_of(facts), mine) == 1


@pytest.mark.parametrize(
    ("source", "segmenter", "expected"),
    [
        (0, "jieba", "its segmenter was none, now it is jieba; "),
        (1, None, "its segmenter was jieba, now it is none; "),
        (1, "icu", "its segmenter was jieba, now it is icu; "),
    ],
)
def test_other_words_are_refused(facts: dict[str, Any], source: int, segmenter: str | None, expected: str) -> None:
    mine = copy.deepcopy(facts)
    mine["sources"][source]["segmenter"] = segmenter
    with pytest.raises(UserError) as caught:
        check_run(CHECKPOINT, summary_of(facts), mine)
    message = str(caught.value)
    assert message.startswith(f"{CHECKPOINT} cannot go on with {mine['sources'][source]['path']}, ")
    assert expected in message
    # Where no words are switched it does not matter.
    assert check_run(CHECKPOINT, summary_of(facts), {**mine, "code_switch": False}) == 1


def test_other_dictionary_is_refused(facts: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    mine = copy.deepcopy(facts)
    # Another path is the same dictionary, moved.
    mine["switching"].update(table="elsewhere", coverage=None)
    with caplog.at_level(logging.WARNING):
        assert check_run(CHECKPOINT, summary_of(facts), mine) == 1
    assert caplog.text == ""
    mine["switching"]["digest"] = "d2"
    with pytest.raises(UserError) as caught:
        check_run(CHECKPOINT, summary_of(facts), mine)
    message = str(caught.value)
    assert message.startswith(f"{CHECKPOINT} cannot go on with the dictionary table elsewhere, ")
    assert "was d1, now it is d2; give dictionary.table and" in message
    assert "\n" not in message
    # Where no words are switched it does not matter.
    assert check_run(CHECKPOINT, summary_of(facts), {**mine, "switching": None, "code_switch": False}) == 1


def test_changed_settings_of_code_switching_are_named(facts: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    mine = copy.deepcopy(facts)
    mine["switching"]["settings"].update(ratio=0.4, label_mode="mix")
    with caplog.at_level(logging.WARNING):
        assert check_run(CHECKPOINT, summary_of(facts), mine) == 1
    (record,) = caplog.records
    assert record.getMessage() == (
        f"code_switch.ratio, code_switch.label_mode changed since {CHECKPOINT} was saved: words are switched otherwise "
        "from here on"
    )


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"ratio": 0.7, "label_mode": "mix", "lookahead": 9, "candidate_weights": "uniform"}, True),
        ({"language_weights": {"de": 2.0}}, True),
        ({"case": "exact"}, False),
        ({"min_word_length": 2}, False),
        ({"max_word_length": 9}, False),
        ({"source_languages": ["en"]}, False),
        ({"language_weights": {"de": 1.0, "fr": 1.0}}, False),
    ],
)
def test_coverage_holds_for_the_same_words(facts: dict[str, Any], change: dict[str, Any], kept: bool) -> None:
    section = CodeSwitchSection(ratio=0.3, language_weights={"de": 1.0})
    switching = code_switch_fingerprint("table", section, digest="d1", coverage={"en": 0.5})
    summary = summary_of({**facts, "switching": switching})
    assert saved_coverage(summary, replace(section, **change), "d1") == ({"en": 0.5} if kept else None)
    assert saved_coverage(summary, section, "d2") is None
    assert saved_coverage(summary_of({**facts, "switching": None}), section, "d1") is None


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"digest": 1}, "run.switching.digest is 1"),
        ({"settings": None}, "run.switching.settings is None"),
        ({"settings": {"ratio": 0.1}}, "run.switching.settings lacks candidate_weights, case, "),
        ({"coverage": {"en": "x"}}, "run.switching.coverage.en is 'x', expected a number from 0 to 1"),
    ],
)
def test_damaged_switching_is_named(facts: dict[str, Any], damage: dict[str, Any], expected: str) -> None:
    assert find_switching_problem(facts) is None
    problem = find_switching_problem({**facts, "switching": {**facts["switching"], **damage}})
    assert problem is not None and problem.startswith(expected)
    assert find_switching_problem({"switching": 3}) == "run.switching is 3, expected an object"
    assert find_switching_problem({"switching": None}) is None
