"""Checks that span the sections of a recipe, and the number of processes."""

import math
from pathlib import Path
from typing import Any

import pytest
from support.recipe_values import write_recipe

from megatron_prealign.errors import UserError
from megatron_prealign.recipe import Recipe, RecipeValueError, load_recipe

TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"


def load(directory: Path, changes: dict[str, Any]) -> Recipe:
    return load_recipe(["--config", write_recipe(directory, changes)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optimizer.lr_warmup_iters": 3},
            "optimizer.lr_warmup_iters is 3, expected less than training.train_iters (3)",
        ),
        (
            {"alignment.lr_warmup_iters": 5},
            "alignment.lr_warmup_iters is 5, expected less than alignment.train_iters (5)",
        ),
    ],
)
def test_warm_up_that_never_ends(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, changes)
    assert message in str(caught.value)


def test_warm_up_that_may_end(tmp_path: Path) -> None:
    load(tmp_path, {"optimizer.lr_warmup_iters": 2, "alignment.lr_warmup_iters": 4})
    # Nor are those of a phase that is left out there to warm up in.
    load(tmp_path, {"alignment.train_iters": 0, "alignment.lr_warmup_iters": 1, "alignment_guard": {}})
    # Steps that follow from a token budget are not known to the recipe.
    load(tmp_path, {"optimizer.lr_warmup_iters": 50, "training.train_iters": None, "training.train_tokens": 10**6})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {TP: 8, "model.num_query_groups": 4},
            "model.num_attention_heads is 4, expected a multiple of parallel.tensor_model_parallel_size (8)",
        ),
        ({TP: 4}, "model.num_query_groups is 2, expected a multiple of parallel.tensor_model_parallel_size (4)"),
        (
            {TP: 2, "model.ffn_hidden_size": 33},
            "model.ffn_hidden_size is 33, expected a multiple of parallel.tensor_model_parallel_size (2)",
        ),
        (
            {PP: 3},
            "model.num_layers is 4, expected a multiple of parallel.pipeline_model_parallel_size x "
            "virtual_pipeline_model_parallel_size (3 x 1 = 3)",
        ),
        (
            {PP: 2, VPP: 3},
            "model.num_layers is 4, expected a multiple of parallel.pipeline_model_parallel_size x "
            "virtual_pipeline_model_parallel_size (2 x 3 = 6)",
        ),
        (
            {TP: 2, "parallel.sequence_parallel": True, "data.seq_length": 15},
            "data.seq_length is 15, expected a multiple of parallel.tensor_model_parallel_size (2) when "
            "parallel.sequence_parallel is true",
        ),
        (
            {"model.max_position_embeddings": 8},
            "model.max_position_embeddings is 8, expected at least data.seq_length (16)",
        ),
        (
            {"training.global_batch_size": 7},
            "training.global_batch_size is 7, expected a multiple of training.micro_batch_size (2)",
        ),
        (
            {"alignment.lm_global_batch_size": 5},
            "alignment.lm_global_batch_size is 5, expected a multiple of alignment.lm_micro_batch_size (null: "
            "training.micro_batch_size) (2)",
        ),
        (
            {"alignment.lm_micro_batch_size": 3},
            "alignment.lm_global_batch_size is 4, expected a multiple of alignment.lm_micro_batch_size (null: "
            "training.micro_batch_size) (3)",
        ),
        (
            {"alignment": {"train_iters": 0, "words_per_step": 32, "lr": 0.001}},
            "alignment.train_iters is 0, expected a number above 0, or a section alignment_guard that uses the other "
            "fields",
        ),
        (
            {"alignment.alpha": 0.0, "alignment.lm_weight": 0.0},
            "alignment.alpha is 0.0, expected a number above 0, or gamma above 0, or lm_weight above 0 with "
            "lm_global_batch_size: nothing is trained",
        ),
        (
            {"alignment.alpha": 0.0, "alignment.lm_global_batch_size": 0},
            "alignment.alpha is 0.0, expected a number above 0, or gamma above 0, or lm_weight above 0 with "
            "lm_global_batch_size: nothing is trained",
        ),
        (
            {"alignment_guard": {"interval": 11}, "training.train_iters": 10},
            "alignment_guard.interval is 11, expected at most training.train_iters (10), or no step has words",
        ),
        (
            {"alignment.stop_at_p_at_1": 0.5},
            "alignment.stop_at_p_at_1 is 0.5, expected null, or training.eval_interval set: evaluations tell when it "
            "is reached",
        ),
        (
            {"model.family": "gpt2", "model.num_query_groups": None, "alignment.max_word_tokens": 33},
            "alignment.max_word_tokens is 33, expected at most 16, the positions of the model "
            "(model.max_position_embeddings, or data.seq_length)",
        ),
        (
            {"model.recompute_granularity": "full", "model.recompute_num_layers": 3},
            "model.recompute_num_layers is 3, expected a divisor of the 4 blocks of a model chunk (model.num_layers / "
            "(pipeline_model_parallel_size x virtual_pipeline_model_parallel_size))",
        ),
        (
            {"alignment.layers": [0, 6]},
            "alignment.layers is [0, 6] with layer 6, expected layers from 0 to 5 (model.num_layers + 1)",
        ),
        (
            {"alignment.layers": [-1]},
            "alignment.layers is [-1] with layer -1, expected layers from 0 to 5 (model.num_layers + 1)",
        ),
        *[
            (
                {"alignment.layers": layers},
                f"alignment.layers is {layers} with layer 6, expected layers from 0 to 5 (model.num_layers + 1)",
            )
            for layers in ("3-6", {0: 1.0, 6: 2.0})
        ],
        (
            {"alignment": None, "alignment_guard": {}},
            "alignment_guard is set, expected null, or a section alignment with the settings of its words",
        ),
        (
            {"alignment_guard": {"floor": 0.5}},
            "alignment_guard.floor is set, expected null, or a section alignment_watch, which measures what falls "
            "below it",
        ),
        (
            {"alignment.freeze": "lower", "alignment.keep_optimizer": True},
            "alignment.keep_optimizer is true, expected false with alignment.freeze lower: the frozen blocks have no "
            "optimizer state to keep",
        ),
        (
            {"model.num_layers": 1, "alignment.freeze": "upper"},
            "alignment.freeze is upper, expected none with model.num_layers 1, which has no half",
        ),
        *[
            ({f"alignment.{name}": math.inf}, f"alignment.{name} is inf, expected a finite number")
            for name in ("alpha", "gamma", "lm_weight", "lr", "temperature")
        ],
        (
            {"dictionary": None, "code_switch": None},
            "alignment is set, expected null, or a dictionary section with the path of the table",
        ),
        (
            {"dictionary": None, "alignment": None},
            "code_switch is set, expected null, or a dictionary section with the path of the table",
        ),
        (
            {"dictionary": None, "alignment": None, "code_switch": None, "alignment_watch.interval": 5},
            "alignment_watch is set, expected null, or a dictionary section with the path of the table",
        ),
        (
            {"alignment_watch.interval": 5, "dictionary.held_out_fraction": 0.0},
            "alignment_watch.groups is held_out, expected trained, because dictionary.held_out_fraction is 0",
        ),
        (
            {"code_switch.lookahead": 17},
            "code_switch.lookahead is 17, expected null or at most data.seq_length (16)",
        ),
        (
            # 5 alignment steps of 4 rows and one step of 8 rows, 16 tokens each: 28 rows.
            {"training.train_iters": None, "training.train_tokens": 28 * 16 - 1},
            "training.train_tokens is 447, expected at least 448: alignment.train_iters x "
            "alignment.lm_global_batch_size x data.seq_length and one step of training.global_batch_size x "
            "data.seq_length",
        ),
    ],
)
def test_sections_that_do_not_fit_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, changes)
    assert str(caught.value) == f"recipe {tmp_path / 'recipe.yaml'}: {message}"


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
        {"alignment_guard": {"floor": 0.5}, "alignment_watch": {"interval": 10}},
        # The words of the guard, without a phase of their own.
        {"alignment.train_iters": 0, "alignment_guard": {}},
        {"alignment.train_iters": 0, "alignment_guard": {}, "training.train_iters": None, "training.train_tokens": 128},
        {"dictionary": None, "alignment": None, "code_switch": None},
        {"alignment.lm_global_batch_size": 0},
        {"alignment_watch.interval": 5, "alignment": None, "code_switch": None},
        {"alignment_watch": {"interval": 5, "groups": "trained"}, "dictionary.held_out_fraction": 0.0},
        {"model.max_position_embeddings": 16},
        {"training.train_iters": None, "training.train_tokens": 28 * 16},
    ],
)
def test_sound_recipes(tmp_path: Path, changes: dict[str, Any]) -> None:
    load(tmp_path, changes)


def test_world_size_gives_the_data_parallel_size(tmp_path: Path) -> None:
    assert load(tmp_path, {}).check_world_size(1) == 1
    assert load(tmp_path, {}).check_world_size(2) == 2
    assert load(tmp_path, {TP: 2, PP: 2}).check_world_size(8) == 2
    # Pipeline stages share no words out.
    words = {"alignment.words_per_step": 12, "alignment.word_micro_batch_size": 2, TP: 2, PP: 2}
    assert load(tmp_path, words).check_world_size(8) == 2
    assert load(tmp_path, {"alignment.word_micro_batch_size": 16}).check_world_size(2) == 2


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        (
            {TP: 2, PP: 2},
            6,
            "the number of processes is 6, expected a multiple of parallel.tensor_model_parallel_size x "
            "pipeline_model_parallel_size (4); change --nproc-per-node or the parallel section",
        ),
        ({}, 0, "the number of processes is 0, expected a number above 0"),
        (
            {"alignment": None},
            8,
            "training.global_batch_size is 8, expected a multiple of the micro batch x data-parallel size (2 x 8 = 16) "
            "with 8 processes",
        ),
        (
            {"training.global_batch_size": 16},
            4,
            "alignment.lm_global_batch_size is 4, expected a multiple of the micro batch x data-parallel size "
            "(2 x 4 = 8) with 4 processes",
        ),
        (
            {"training.global_batch_size": 16, "alignment.lm_micro_batch_size": 1},
            8,
            "alignment.lm_global_batch_size is 4, expected a multiple of the data-parallel size (1 x 8 = 8) with "
            "8 processes",
        ),
        (
            {"alignment.words_per_step": 33},
            2,
            "alignment.words_per_step is 33, expected a multiple of data-parallel size x tensor_model_parallel_size "
            "(2 x 1 = 2) with 2 processes",
        ),
        (
            {"alignment.words_per_step": 34, TP: 2},
            4,
            "alignment.words_per_step is 34, expected a multiple of data-parallel size x tensor_model_parallel_size "
            "(2 x 2 = 4) with 4 processes",
        ),
        (
            {"alignment.word_micro_batch_size": 5},
            1,
            "alignment.word_micro_batch_size is 5, expected null or a divisor of the 32 words of a data-parallel rank "
            "(alignment.words_per_step / 1) that is a multiple of tensor_model_parallel_size (1)",
        ),
        (
            # Divides the words of a step, but not those of a rank.
            {"alignment.word_micro_batch_size": 32},
            2,
            "alignment.word_micro_batch_size is 32, expected null or a divisor of the 16 words of a data-parallel rank "
            "(alignment.words_per_step / 2) that is a multiple of tensor_model_parallel_size (1)",
        ),
        (
            {"alignment.word_micro_batch_size": 1, TP: 2},
            4,
            "alignment.word_micro_batch_size is 1, expected null or a divisor of the 16 words of a data-parallel rank "
            "(alignment.words_per_step / 2) that is a multiple of tensor_model_parallel_size (2)",
        ),
    ],
)
def test_world_size_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(RecipeValueError) as caught:
        load(tmp_path, changes).check_world_size(world_size)
    assert str(caught.value) == message


def test_directories_lie_in_the_run_unless_named(tmp_path: Path) -> None:
    recipe = load(tmp_path, {})
    assert recipe.checkpoint_dir == Path("run/checkpoints")
    assert recipe.cache_dir == Path("run/cache")
    recipe = load(tmp_path, {"checkpoint.directory": "elsewhere", "data.cache": "fast"})
    assert recipe.checkpoint_dir == Path("elsewhere")
    assert recipe.cache_dir == Path("fast")
