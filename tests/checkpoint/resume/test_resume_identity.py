"""A run resumes only from a checkpoint with the same phases, precision and data order."""

import copy
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts, user_error
from support.tiny import Tiny, recipe_of

from megatron_prealign.checkpoint.resume.identity import (
    check_model,
    check_run,
    code_switch_fingerprint,
    find_switching_problem,
    resume_fingerprint,
    saved_coverage,
)
from megatron_prealign.checkpoint.train_state import TrainState
from megatron_prealign.recipe import CodeSwitchSection
from megatron_prealign.recipe.model import ModelSection

CHECKPOINT = Path("run/checkpoints/step_00000007")
PHASES = ["alignment", "language_model"]


@pytest.fixture
def fingerprint(tmp_path: Path) -> dict[str, Any]:
    recipe = recipe_of(Tiny(tmp_path).values(tmp_path), tmp_path)
    assert recipe.code_switch is not None
    switching = code_switch_fingerprint("table", recipe.code_switch, fingerprint="d1", coverage={"en": 0.5})
    return resume_fingerprint(recipe, num_samples=60, keys=[0, 1], segmenters=[None, "jieba"], switching=switching)


def summary_of(run: dict[str, Any], phase: str = "language_model", **counters: int) -> dict[str, Any]:
    state = TrainState(consumed_samples=24, **counters).to_dict()
    return {"run": copy.deepcopy(run), "phase": phase, "train_state": state}


@pytest.mark.parametrize(
    ("saved", "current", "phase", "position"),
    [
        (PHASES, PHASES, "alignment", 0),
        (PHASES, PHASES, "language_model", 1),
        # With train_tokens the samples stay the same when the section is added or removed.
        (["language_model"], PHASES, "language_model", 1),
        (PHASES, ["language_model"], "language_model", 0),
    ],
)
def test_phase_is_found_by_its_name(
    fingerprint: dict[str, Any], saved: list[str], current: list[str], phase: str, position: int
) -> None:
    summary = summary_of({**fingerprint, "phases": saved}, phase)
    assert check_run(CHECKPOINT, summary, {**fingerprint, "phases": current}) == position


def test_phase_that_the_recipe_lacks_is_refused(fingerprint: dict[str, Any]) -> None:
    with user_error(CHECKPOINT, "phase alignment", "language_model", "section alignment"):
        check_run(CHECKPOINT, summary_of(fingerprint, "alignment"), {**fingerprint, "phases": ["language_model"]})


@pytest.mark.parametrize(
    ("name", "saved", "current", "expected"),
    [
        ("seq_length", 32, 64, "data.seq_length 32 (recipe: 64)"),
        ("reset_position_ids", False, True, "data.reset_position_ids False (recipe: True)"),
        ("reset_attention_mask", False, True, "data.reset_attention_mask False (recipe: True)"),
        ("precision", "fp32", "bf16", "training.precision fp32 (recipe: bf16)"),
        ("use_distributed_optimizer", True, False, "parallel.use_distributed_optimizer True (recipe: False)"),
        ("seed", 3, 4, "training.seed 3 (recipe: 4)"),
    ],
)
def test_difference_is_reported_with_both_values(
    fingerprint: dict[str, Any], name: str, saved: object, current: object, expected: str
) -> None:
    assert fingerprint[name] == saved
    with user_error(CHECKPOINT, expected) as caught:
        check_run(CHECKPOINT, summary_of(fingerprint), {**fingerprint, name: current})
    assert str(caught.value).count("(recipe:") == 1


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("training.train_iters", 9, "training.train_iters 5 -> 9"),
        ("training.train_iters", 3, "training.train_iters 5 -> 3"),
        ("training.global_batch_size", 16, "training.global_batch_size 8 -> 16"),
    ],
)
def test_a_run_may_become_longer_or_shorter(
    fingerprint: dict[str, Any], caplog: pytest.LogCaptureFixture, field: str, value: int, expected: str
) -> None:
    current = copy.deepcopy(fingerprint)
    current["budget"][field] = value
    with caplog.at_level(logging.WARNING):
        assert check_run(CHECKPOINT, summary_of(fingerprint, phase_step=3), current) == 1
    (record,) = caplog.records
    assert_facts(record.getMessage(), expected, CHECKPOINT, "learning-rate schedule")


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"training.train_iters": 2}, ("training.train_iters is 2", "3 are already done")),
        # 16 samples of 32 tokens in this phase, after 100 tokens of the previous one.
        (
            {"training.train_iters": None, "training.train_tokens": 611},
            ("training.train_tokens is 611", "612 are already done"),
        ),
    ],
)
def test_a_run_cannot_become_shorter_than_what_is_done(
    fingerprint: dict[str, Any], budget: dict[str, int], expected: tuple[str, ...]
) -> None:
    current = copy.deepcopy(fingerprint)
    current["budget"].update(budget)
    summary = summary_of(fingerprint, phase_step=3, phase_start_samples=8, phase_start_tokens=100)
    with user_error(CHECKPOINT, *expected, CHECKPOINT.parent / "latest"):
        check_run(CHECKPOINT, summary, current)
    for name, value in budget.items():
        current["budget"][name] = None if value is None else value + 1
    assert check_run(CHECKPOINT, summary, current) == 1


def test_the_alignment_phase_cannot_become_shorter_than_what_is_done(
    fingerprint: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    current = copy.deepcopy(fingerprint)
    current["budget"]["alignment.train_iters"] = 2
    with user_error(CHECKPOINT, "alignment.train_iters is 2", "3 are already done", CHECKPOINT.parent / "latest"):
        check_run(CHECKPOINT, summary_of(fingerprint, "alignment", phase_step=3), current)
    with caplog.at_level(logging.WARNING):
        # After the end of the phase it does not matter.
        assert check_run(CHECKPOINT, summary_of(fingerprint, phase_step=3), current) == 1
        assert caplog.text == ""
        assert check_run(CHECKPOINT, summary_of(fingerprint, "alignment", phase_step=2), current) == 0
    saved = fingerprint["budget"]["alignment.train_iters"]
    assert_facts(caplog.text, f"alignment.train_iters {saved} -> 2", CHECKPOINT)


def test_segmenters_are_compared_in_any_order_of_the_sources(fingerprint: dict[str, Any]) -> None:
    current = copy.deepcopy(fingerprint)
    current["sources"].reverse()
    assert check_run(CHECKPOINT, summary_of(fingerprint), current) == 1
    # A new source has no segmenter to keep.
    current["sources"].append({"key": 2, "path": "new", "language": "zh", "weight": 1.0, "segmenter": "jieba"})
    assert check_run(CHECKPOINT, summary_of(fingerprint), current) == 1


@pytest.mark.parametrize(
    ("source", "segmenter", "expected"),
    [
        (0, "jieba", "is jieba, expected none"),
        (1, None, "is none, expected jieba"),
        (1, "icu", "is icu, expected jieba"),
    ],
)
def test_another_segmenter_is_refused(
    fingerprint: dict[str, Any], source: int, segmenter: str | None, expected: str
) -> None:
    current = copy.deepcopy(fingerprint)
    current["sources"][source]["segmenter"] = segmenter
    with user_error(CHECKPOINT, current["sources"][source]["path"], "segmenter", expected):
        check_run(CHECKPOINT, summary_of(fingerprint), current)
    # Without code-switching it does not matter.
    assert check_run(CHECKPOINT, summary_of(fingerprint), {**current, "code_switch": False}) == 1


def test_another_dictionary_is_refused(fingerprint: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    current = copy.deepcopy(fingerprint)
    # A moved dictionary is the same.
    current["switching"].update(table="elsewhere", coverage=None)
    with caplog.at_level(logging.WARNING):
        assert check_run(CHECKPOINT, summary_of(fingerprint), current) == 1
    assert caplog.text == ""
    current["switching"]["digest"] = "d2"
    options = ("dictionary.table", "dictionary.held_out_fraction")
    with user_error(CHECKPOINT, "dictionary table elsewhere", "is d2, expected d1", *options):
        check_run(CHECKPOINT, summary_of(fingerprint), current)
    # Without code-switching it does not matter.
    assert check_run(CHECKPOINT, summary_of(fingerprint), {**current, "switching": None, "code_switch": False}) == 1


def test_changed_settings_of_code_switching_are_logged(
    fingerprint: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    current = copy.deepcopy(fingerprint)
    current["switching"]["settings"].update(ratio=0.4, label_mode="mix")
    with caplog.at_level(logging.WARNING):
        assert check_run(CHECKPOINT, summary_of(fingerprint), current) == 1
    (record,) = caplog.records
    assert_facts(record.getMessage(), "code_switch.ratio, code_switch.label_mode", CHECKPOINT)


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
def test_coverage_is_kept_for_the_same_words(fingerprint: dict[str, Any], change: dict[str, Any], kept: bool) -> None:
    section = CodeSwitchSection(ratio=0.3, language_weights={"de": 1.0})
    switching = code_switch_fingerprint("table", section, fingerprint="d1", coverage={"en": 0.5})
    summary = summary_of({**fingerprint, "switching": switching})
    assert saved_coverage(summary, replace(section, **change), "d1") == ({"en": 0.5} if kept else None)
    assert saved_coverage(summary, section, "d2") is None
    assert saved_coverage(summary_of({**fingerprint, "switching": None}), section, "d1") is None


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"digest": 1}, ("run.switching.digest is 1",)),
        ({"settings": None}, ("run.switching.settings is None",)),
        ({"settings": {"ratio": 0.1}}, ("run.switching.settings is missing candidate_weights, case, ",)),
        ({"coverage": {"en": "x"}}, ("run.switching.coverage.en is 'x'", "from 0 to 1")),
    ],
)
def test_invalid_switching_is_reported(
    fingerprint: dict[str, Any], damage: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert find_switching_problem(fingerprint) is None
    problem = find_switching_problem({**fingerprint, "switching": {**fingerprint["switching"], **damage}})
    assert problem is not None
    assert_facts(problem, *expected)
    problem = find_switching_problem({"switching": 3})
    assert problem is not None
    assert_facts(problem, "run.switching is 3", "object")
    assert find_switching_problem({"switching": None}) is None


@pytest.mark.parametrize(
    ("family", "written"),
    [
        ("llama", {"num_query_groups": 4, "kv_channels": 16, "ffn_hidden_size": 192, "max_position_embeddings": 4096}),
        ("gpt2", {"num_query_groups": 4, "kv_channels": 16, "ffn_hidden_size": 256}),
    ],
)
def test_null_is_the_size_it_stands_for(family: str, written: dict[str, Any]) -> None:
    others = {"vocab_size": 10, "tokenizer_fingerprint": "t"}
    plain = asdict(ModelSection(num_layers=2, hidden_size=64, num_attention_heads=4, family=family))
    for saved, current in ((plain, plain | written), (plain | written, plain)):
        check_model(Path("step"), {**others, "model": saved}, {**others, "model": current})
    with user_error("step", "ffn_hidden_size", "(recipe: 320)"):
        check_model(Path("step"), {**others, "model": plain}, {**others, "model": plain | {"ffn_hidden_size": 320}})


def test_learned_positions_belong_to_the_model() -> None:
    others = {"vocab_size": 10, "tokenizer_fingerprint": "t"}
    plain = asdict(ModelSection(num_layers=2, hidden_size=64, num_attention_heads=4, family="gpt2"))
    with user_error("step", "max_position_embeddings null (recipe: 64)"):
        check_model(
            Path("step"), {**others, "model": plain}, {**others, "model": plain | {"max_position_embeddings": 64}}
        )
