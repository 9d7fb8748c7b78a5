"""Steps, tokens and passes of a run, its memory and its checkpoints, computed from the recipe."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.tiny import Tiny, recipe_of

from megatron_prealign.recipe import CheckpointSection, Recipe
from megatron_prealign.run.plan import PhaseLength, SourceTokens, passes, phase_lengths, tokens_per_word
from megatron_prealign.run.requirements import SavedSteps, free_disk_bytes, most_checkpoints, process_memory


@pytest.fixture
def values(tiny: Tiny, tmp_path: Path) -> dict[str, Any]:
    return tiny.values(tmp_path / "run")


def lengths_of(values: dict[str, Any], directory: Path, word_length: float = 3.0) -> list[PhaseLength]:
    return phase_lengths(recipe_of(values, directory), word_length)


def test_steps_of_both_phases(values: dict[str, Any], tmp_path: Path) -> None:
    assert lengths_of(values, tmp_path) == [
        PhaseLength("alignment", 5, samples=5 * 4, word_tokens=5 * 32 * 3),
        PhaseLength("language_model", 5, samples=5 * 8, word_tokens=0),
    ]


def test_steps_of_a_token_budget(values: dict[str, Any], tmp_path: Path) -> None:
    """The alignment phase uses 5 x 4 x 32 tokens of text and 480 of words: 1,120 of 3,000; a step has 8 x 32."""
    del values["training"]["train_iters"]
    values["training"]["train_tokens"] = 3000
    assert lengths_of(values, tmp_path)[1] == PhaseLength("language_model", 1880 // 256, samples=7 * 8, word_tokens=0)


def test_steps_with_words_of_the_guard(values: dict[str, Any], tmp_path: Path) -> None:
    values["alignment_guard"] = {"interval": 2}
    assert [length.word_tokens for length in lengths_of(values, tmp_path)] == [5 * 32 * 3, 2 * 32 * 3]


def test_passes_follow_the_weights() -> None:
    sources = [SourceTokens("a", "en", 3.0, tokens=600), SourceTokens("b", "de", 1.0, tokens=50)]
    lengths = [PhaseLength("alignment", 1, 10, 999), PhaseLength("language_model", 9, 90, 0)]
    read = passes(lengths, sources, seq_length=8)
    assert [(each.share, each.tokens, each.passes) for each in read] == [(0.75, 600, 1.0), (0.25, 200, 4.0)]


def test_tokens_per_word_is_a_mean_over_languages_of_groups() -> None:
    """Words of 1, 3 and 5 tokens: the first two are alternatives of one language of a group, drawn half as often. The
    word of 9 tokens belongs to a group that cannot be drawn."""
    table = SimpleNamespace(word_offsets=np.cumsum([0, 1, 3, 9, 5]))
    words = SimpleNamespace(words=np.array([0, 1, 2, 3]), first=np.array([0, 3]), counts=np.array([2, 1]))
    parts: Any = SimpleNamespace(table=table, words=words)
    assert tokens_per_word(parts) == (2 + 5) / 2
    parts.words = None
    assert tokens_per_word(parts) == tokens_per_word(None) == 0.0


@pytest.mark.parametrize(("interval", "steps"), [(None, [5, 12]), (5, [5, 10, 12]), (4, [4, 5, 8, 12]), (100, [5, 12])])
def test_saved_steps(interval: int | None, steps: list[int]) -> None:
    saved = SavedSteps.of_phases([5, 7], interval)
    assert saved.newest(100) == steps and saved.newest(2) == steps[-2:]
    for every in (1, 2, 4, 5, 7, 100):
        assert saved.count(every) == sum(step % every == 0 for step in steps)


@pytest.mark.parametrize(
    ("settings", "most"),
    [
        ({"keep": 1}, 2),
        ({"keep": 2}, 3),
        ({"keep": 50}, 10),
        # 20, 40, 60, 80, 100 and 90, of which 100 and 90 are the newest two.
        ({"keep": 2, "keep_every": 20}, 7),
        ({"keep": 2, "keep_best": "validation_loss/en"}, 4),
    ],
)
def test_most_checkpoints(settings: dict[str, Any], most: int) -> None:
    assert most_checkpoints(SavedSteps.of_phases([100], 10), CheckpointSection(**settings)) == most


def test_checkpoints_of_a_run_without_end() -> None:
    """More checkpoints than can be listed."""
    steps = SavedSteps.of_phases([7, 10**15], 10)
    assert steps.count() == 10**14 + 2
    assert most_checkpoints(steps, CheckpointSection(keep=10**12, keep_every=10**6)) == 10**12 + 10**9 + 1
    assert most_checkpoints(steps, CheckpointSection(keep=10**18)) == 10**14 + 2


@pytest.mark.parametrize(
    ("precision", "distributed", "expected"),
    [
        # Bytes per parameter: weights, gradients, optimizer (two processes share it), copy for a save.
        ("fp32", True, (4, 4, 8 / 2, 4 + 12 / 2)),
        ("bf16", True, (2, 4, 12 / 2, 2 + 12 / 2)),
        ("fp32", False, (4, 4, 8, 4 + 8)),
        ("bf16", False, (2, 4, 12, 2 + 12)),
    ],
)
def test_memory(
    values: dict[str, Any], tmp_path: Path, precision: str, distributed: bool, expected: tuple[float, ...]
) -> None:
    values["training"]["precision"] = precision
    values["parallel"] = {"use_distributed_optimizer": distributed}
    recipe = recipe_of(values, tmp_path)
    memory = process_memory(recipe, 100, data_parallel_size=2)
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.checkpoint_copy)
    assert parts == tuple(100 * each for each in expected)
    assert memory.total == sum(parts[:3])
    assert process_memory(without_background_saves(recipe), 100, 2).checkpoint_copy == 0


def without_background_saves(recipe: Recipe) -> Recipe:
    return replace(recipe, checkpoint=replace(recipe.checkpoint, async_save=False))


def test_free_disk_of_a_directory_that_does_not_exist_yet(tmp_path: Path) -> None:
    free = free_disk_bytes(tmp_path / "run" / "checkpoints")
    assert free is not None and free > 0
