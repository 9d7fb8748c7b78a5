"""The model card says what the settings of the run mean."""

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_prealign.conversion.card import model_card
from megatron_prealign.recipe import CodeSwitchSection, ModelSection


def card(section: CodeSwitchSection | None, directory: Path) -> str:
    run: dict[str, Any] = {"phases": ["language_model"], "code_switch": section is not None}
    run["switching"] = None if section is None else {"settings": asdict(section)}
    model = ModelSection(num_layers=1, hidden_size=8, num_attention_heads=2)
    result: Any = SimpleNamespace(dtype="float32", from_master_weights=False, parameters=5, notes=[])
    tokenizer: Any = SimpleNamespace(converted=True, eod_token="<eod>", eod_id=0, kind="test")
    summary = {"kind": "run", "run": run, "train_state": {"step": 1, "tokens": 8}, "vocab_size": 10}
    return model_card("model", directory, summary, model, 8, result, tokenizer, None)


@pytest.mark.parametrize(
    ("ratio_of", "meaning"), [("occurrences", "probability that an occurrence"), ("words", "fraction of all running")]
)
def test_the_card_says_what_the_ratio_is(tmp_path: Path, ratio_of: Any, meaning: str) -> None:
    text = card(CodeSwitchSection(ratio=0.05, ratio_of=ratio_of), tmp_path)
    assert '"ratio": 0.05' in text and f"`ratio` is the {meaning}" in text and "with code-switching" in text
    assert "known words" not in text


def test_the_card_of_a_run_without_switching(tmp_path: Path) -> None:
    assert "switch" not in card(None, tmp_path)
