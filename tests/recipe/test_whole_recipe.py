"""Checks across the sections of a recipe, and of the world size."""

from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts, user_error
from support.recipe_values import write_recipe

from megatron_prealign.errors import UserError
from megatron_prealign.recipe import Recipe, RecipeValueError, load_recipe

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"


def load(directory: Path, changes: dict[str, Any]) -> Recipe:
    return load_recipe(["--config", write_recipe(directory, changes)])


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"optimizer.lr_warmup_iters": 3}, ("optimizer.lr_warmup_iters is 3", "less than training.train_iters (3)")),
        ({"alignment.lr_warmup_iters": 5}, ("alignment.lr_warmup_iters is 5", "less than alignment.train_iters (5)")),
    ],
)
def test_warm_up_that_never_ends(tmp_path: Path, changes: dict[str, Any], facts: tuple[str, ...]) -> None:
    with user_error(*facts):
        load(tmp_path, changes)


def test_warm_up_that_may_end(tmp_path: Path) -> None:
    load(tmp_path, {"optimizer.lr_warmup_iters": 2, "alignment.lr_warmup_iters": 4})
    # A phase that is skipped has no steps to warm up in.
    load(tmp_path, {"alignment.train_iters": 0, "alignment.lr_warmup_iters": 1, "alignment_guard": {"interval": 1}})
    # With a token budget, the recipe does not know the number of steps.
    load(tmp_path, {"optimizer.lr_warmup_iters": 50, "training.train_iters": None, "training.train_tokens": 10**6})


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        (
            {TP: 8, "model.num_query_groups": 4},
            ("model.num_attention_heads is 4", "a multiple of parallel.tensor_model_parallel_size (8)"),
        ),
        ({TP: 4}, ("model.num_query_groups is 2", "a multiple of parallel.tensor_model_parallel_size (4)")),
        (
            {TP: 2, "model.ffn_hidden_size": 33},
            ("model.ffn_hidden_size is 33", "a multiple of parallel.tensor_model_parallel_size (2)"),
        ),
        ({PP: 3}, ("model.num_layers is 4", "pipeline_model_parallel_size", "(3 x 1 = 3)")),
        (
            {PP: 2, VPP: 3},
            (
                "model.num_layers is 4",
                "parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size",
                "(2 x 3 = 6)",
            ),
        ),
        (
            {TP: 2, "parallel.sequence_parallel": True, "data.seq_length": 15},
            (
                "data.seq_length is 15",
                "a multiple of parallel.tensor_model_parallel_size (2)",
                "parallel.sequence_parallel",
            ),
        ),
        ({"model.max_position_embeddings": 8}, ("model.max_position_embeddings is 8", "data.seq_length (16)")),
        (
            {"training.global_batch_size": 7},
            ("training.global_batch_size is 7", "a multiple of training.micro_batch_size (2)"),
        ),
        (
            {"alignment.lm_global_batch_size": 5},
            (
                "alignment.lm_global_batch_size is 5",
                "a multiple of 2",
                "alignment.lm_micro_batch_size",
                "training.micro_batch_size",
            ),
        ),
        (
            {"alignment.lm_micro_batch_size": 3},
            ("alignment.lm_global_batch_size is 4", "a multiple of 3", "alignment.lm_micro_batch_size"),
        ),
        (
            {"alignment": {"train_iters": 0, "words_per_step": 32, "lr": 0.001}},
            ("alignment.train_iters is 0", "positive", "alignment_guard"),
        ),
        (
            {"alignment.alpha": 0.0, "alignment.lm_weight": 0.0},
            ("alignment.alpha is 0.0", "gamma", "lm_weight", "lm_global_batch_size"),
        ),
        (
            {"alignment.alpha": 0.0, "alignment.lm_global_batch_size": 0},
            ("alignment.alpha is 0.0", "gamma", "lm_weight", "lm_global_batch_size"),
        ),
        (
            {"alignment_guard": {"interval": 11}, "training.train_iters": 10},
            ("alignment_guard.interval is 11", "at most training.train_iters (10)"),
        ),
        ({"alignment.stop_at_p_at_1": 0.5}, ("alignment.stop_at_p_at_1 is 0.5", "training.eval_interval")),
        (
            {"model.family": "gpt2", "model.num_query_groups": None, "alignment.max_word_tokens": 33},
            ("alignment.max_word_tokens is 33", "at most 16", "model.max_position_embeddings", "data.seq_length"),
        ),
        (
            {"model.recompute_granularity": "full", "model.recompute_num_layers": 3},
            ("model.recompute_num_layers is 3", "a divisor of the 4 blocks", "model.num_layers"),
        ),
        *[
            ({"alignment.layers": layers}, (f"alignment.layers is {layers}", f"layer {missing},", "0 to 5"))
            for layers, missing in (([0, 6], 6), ([-1], -1), ("3-6", 6), ({0: 1.0, 6: 2.0}, 6))
        ],
        (
            {"alignment": None, "alignment_guard": {"interval": 1}},
            ("alignment_guard is set", "null", "alignment section"),
        ),
        ({"alignment_guard": {"floor": 0.5}}, ("alignment_guard.floor is set", "null", "alignment_watch")),
        (
            {"alignment.freeze": "lower", "alignment.keep_optimizer": True},
            ("alignment.keep_optimizer is true", "alignment.freeze lower"),
        ),
        (
            {"model.num_layers": 1, "alignment.freeze": "upper"},
            ("alignment.freeze is upper", "none", "model.num_layers is 1"),
        ),
        ({"dictionary": None, "code_switch": None}, ("alignment is set", "null", "dictionary section")),
        ({"dictionary": None, "alignment": None}, ("code_switch is set", "null", "dictionary section")),
        (
            {"dictionary": None, "alignment": None, "code_switch": None, "alignment_watch.interval": 5},
            ("alignment_watch is set", "null", "dictionary section"),
        ),
        (
            {"alignment_watch.interval": 5, "dictionary.held_out_fraction": 0.0},
            ("alignment_watch.groups is held_out", "trained", "dictionary.held_out_fraction is 0"),
        ),
        ({"code_switch.lookahead": 17}, ("code_switch.lookahead is 17", "null", "at most data.seq_length (16)")),
        (
            # 5 alignment steps of 4 samples and one step of 8 samples, 16 tokens each: 28 samples.
            {"training.train_iters": None, "training.train_tokens": 28 * 16 - 1},
            (
                "training.train_tokens is 447",
                "at least 448",
                "alignment.train_iters x alignment.lm_global_batch_size x data.seq_length",
                "training.global_batch_size x data.seq_length",
            ),
        ),
    ],
)
def test_inconsistent_sections(tmp_path: Path, changes: dict[str, Any], facts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, changes)
    assert str(caught.value).startswith(f"recipe {tmp_path / 'recipe.yaml'}: {facts[0]}")
    assert_facts(str(caught.value), *facts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {TP: 2, PP: 2},
        {PP: 2, VPP: 2},
        {TP: 2, "parallel.sequence_parallel": True},
        {"alignment.layers": [0, 3, 5]},
        {"alignment.layers": "0-5"},
        {"alignment.layers": {1: 0.5, 5: 3}},
        {"alignment.freeze": "lower"},
        {"alignment_guard": {"interval": 2}},
        {"alignment_guard": {"interval": 1, "floor": 0.5}, "alignment_watch": {"interval": 10}},
        # Words for the guard, without an alignment phase.
        {"alignment.train_iters": 0, "alignment_guard": {"interval": 1}},
        {
            "alignment.train_iters": 0,
            "alignment_guard": {"interval": 1},
            "training.train_iters": None,
            "training.train_tokens": 128,
        },
        {"dictionary": None, "alignment": None, "code_switch": None},
        {"alignment.lm_global_batch_size": 0},
        {"alignment_watch.interval": 5, "alignment": None, "code_switch": None},
        {"alignment_watch": {"interval": 5, "groups": "trained"}, "dictionary.held_out_fraction": 0.0},
        {"model.max_position_embeddings": 16},
        {"training.train_iters": None, "training.train_tokens": 28 * 16},
    ],
)
def test_valid_recipes(tmp_path: Path, changes: dict[str, Any]) -> None:
    load(tmp_path, changes)


def test_world_size_gives_the_data_parallel_size(tmp_path: Path) -> None:
    assert load(tmp_path, {}).check_world_size(1) == 1
    assert load(tmp_path, {}).check_world_size(2) == 2
    assert load(tmp_path, {TP: 2, PP: 2}).check_world_size(8) == 2
    # Words are not divided over pipeline stages.
    words = {"alignment.words_per_step": 12, "alignment.word_micro_batch_size": 2, TP: 2, PP: 2}
    assert load(tmp_path, words).check_world_size(8) == 2
    assert load(tmp_path, {"alignment.word_micro_batch_size": 16}).check_world_size(2) == 2


@pytest.mark.parametrize(
    ("changes", "world_size", "facts"),
    [
        (
            {TP: 2, PP: 2},
            6,
            (
                "world size is 6",
                "a multiple of parallel.tensor_model_parallel_size x pipeline_model_parallel_size (4)",
                "--nproc-per-node",
            ),
        ),
        ({}, 0, ("world size is 0", "positive")),
        (
            {"alignment": None},
            8,
            ("training.global_batch_size is 8", "micro batch size x data-parallel size (2 x 8 = 16)", "world size 8"),
        ),
        (
            {"training.global_batch_size": 16},
            4,
            (
                "alignment.lm_global_batch_size is 4",
                "micro batch size x data-parallel size (2 x 4 = 8)",
                "world size 4",
            ),
        ),
        (
            {"training.global_batch_size": 16, "alignment.lm_micro_batch_size": 1},
            8,
            ("alignment.lm_global_batch_size is 4", "a multiple of data-parallel size (1 x 8 = 8)", "world size 8"),
        ),
        (
            {"alignment.words_per_step": 33},
            2,
            ("alignment.words_per_step is 33", "tensor_model_parallel_size (2 x 1 = 2)", "world size 2"),
        ),
        (
            {"alignment.words_per_step": 34, TP: 2},
            4,
            ("alignment.words_per_step is 34", "tensor_model_parallel_size (2 x 2 = 4)", "world size 4"),
        ),
        (
            {"alignment.word_micro_batch_size": 5},
            1,
            ("alignment.word_micro_batch_size is 5", "a divisor of the 32 words", "(alignment.words_per_step / 1)"),
        ),
        (
            # Divides the words of a step, but not those of a rank.
            {"alignment.word_micro_batch_size": 32},
            2,
            ("alignment.word_micro_batch_size is 32", "a divisor of the 16 words", "(alignment.words_per_step / 2)"),
        ),
        (
            {"alignment.word_micro_batch_size": 1, TP: 2},
            4,
            (
                "alignment.word_micro_batch_size is 1",
                "a divisor of the 16 words",
                "a multiple of tensor_model_parallel_size (2)",
            ),
        ),
    ],
)
def test_world_size_that_does_not_fit(
    tmp_path: Path, changes: dict[str, Any], world_size: int, facts: tuple[str, ...]
) -> None:
    with user_error(*facts, kind=RecipeValueError):
        load(tmp_path, changes).check_world_size(world_size)


def test_directories_default_to_the_run_directory(tmp_path: Path) -> None:
    recipe = load(tmp_path, {})
    assert recipe.checkpoint_dir == Path("run/checkpoints")
    assert recipe.cache_dir == Path("run/cache")
    recipe = load(tmp_path, {"checkpoint.directory": "elsewhere", "data.cache": "fast"})
    assert recipe.checkpoint_dir == Path("elsewhere")
    assert recipe.cache_dir == Path("fast")
