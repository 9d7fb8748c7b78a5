"""Recipes from YAML and options: precedence, messages of one line, round trip, no torch."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts
from support.recipe_values import write_recipe

from megatron_prealign.errors import UserError
from megatron_prealign.recipe import load_recipe, save_recipe


def error_of(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(arguments)
    message = str(caught.value)
    assert "\n" not in message
    # Class names and jsonargparse's jargon mean nothing to a user.
    for jargon in ("<class", "Union", "class_path", "Namespace", "Parser key", "megatron_prealign.recipe"):
        assert jargon not in message
    return message


def test_later_config_and_options_win(tmp_path: Path) -> None:
    first = write_recipe(tmp_path, name="first.yaml")
    second = tmp_path / "second.yaml"
    second.write_text("optimizer: {lr: 0.5}\nmodel: {num_layers: 8}\nalignment: {alpha: 0.5}\n")
    recipe = load_recipe(["--config", first, "--config", str(second), "--model.num_layers", "12"])
    assert recipe.optimizer.lr == 0.5
    assert recipe.model.num_layers == 12
    assert recipe.model.hidden_size == 32
    assert recipe.alignment is not None
    assert (recipe.alignment.alpha, recipe.alignment.words_per_step) == (0.5, 32)
    # The order on the command line decides, not the kind of source.
    recipe = load_recipe(["--config", first, "--model.num_layers", "12", "--config", str(second)])
    assert recipe.model.num_layers == 8


def test_options_reach_optional_sections_and_lists(tmp_path: Path) -> None:
    config = write_recipe(tmp_path)
    recipe = load_recipe(["--config", config, "--alignment.train_iters", "7", "--alignment.layers", "[0, 2]"])
    assert recipe.alignment is not None
    assert (recipe.alignment.train_iters, recipe.alignment.layers) == (7, [0, 2])
    for text, layers in (("2-5", "2-5"), ("all", "all"), ("{0: 1, 4: 2.5}", {0: 1.0, 4: 2.5})):
        section = load_recipe(["--config", config, "--alignment.layers", text]).alignment
        assert section is not None
        assert section.layers == layers
    guard = load_recipe(["--config", config, "--alignment_guard.interval", "3"]).alignment_guard
    assert guard is not None
    assert (guard.interval, guard.floor) == (3, None)
    assert load_recipe(["--config", config, "--alignment", "null"]).alignment is None
    recipe = load_recipe(["--config", config, "--data.sources", '[{"path": "x", "language": "y", "weight": 2}]'])
    assert [(each.path, each.language, each.weight) for each in recipe.data.sources] == [("x", "y", 2.0)]
    absent = write_recipe(tmp_path, {"code_switch": None}, "absent.yaml")
    assert load_recipe(["--config", absent]).code_switch is None
    recipe = load_recipe(["--config", absent, "--code_switch.ratio", "0.5"])
    assert recipe.code_switch is not None
    assert recipe.code_switch.ratio == 0.5


def test_documents_are_separated_only_on_request(tmp_path: Path) -> None:
    config = write_recipe(tmp_path, {"data.reset_attention_mask": True})
    data = load_recipe(["--config", config]).data
    assert (data.reset_position_ids, data.reset_attention_mask) == (False, True)
    data = load_recipe(["--config", config, "--data.reset_position_ids", "true"]).data
    assert (data.reset_position_ids, data.reset_attention_mask) == (True, True)
    assert not load_recipe(["--config", write_recipe(tmp_path, name="plain.yaml")]).data.reset_attention_mask


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"model.foo": 1}, ("unknown field model.foo", "num_layers, hidden_size, ")),
        ({"model.num_layer": 1}, ("unknown field model.num_layer", "did you mean num_layers?")),
        ({"foo": {"a": 1}}, ("unknown field foo,", "model, data, optimizer, ")),
        ({"alignement": {"lr": 1}}, ("unknown field alignement", "did you mean alignment?")),
        ({"alignment": {"foo": 1}}, ("unknown field alignment.foo", "train_iters, words_per_step, ")),
        ({"alignment.foo": 1}, ("unknown field alignment.foo", "train_iters, words_per_step, ")),
        (
            {"data.sources": [{"path": "a", "language": "b", "wait": 1}]},
            ("line 12", "unknown field data.sources[0].wait", "did you mean weight?"),
        ),
        ({"alignment": {"train_iters": 1}}, ("alignment.words_per_step, alignment.lr", "required")),
        ({"alignment": [1]}, ("alignment is [1]", "section")),
        ({"alignment.train_iters": "many"}, ("alignment.train_iters is many", "integer")),
        ({"alignment.layers": ["first"]}, ("alignment.layers is ['first']", "string, a list or a mapping")),
        ({"alignment.layers": 3}, ("alignment.layers is 3", "string, a list or a mapping")),
        ({"alignment.layers": {0: "much"}}, ("alignment.layers is {0: 'much'}", "string, a list or a mapping")),
        ({"alignment.layers": "first"}, ("alignment.layers is 'first'", "all", "[0, 12, 24]", '"8-16"')),
        ({"alignment.layers": {2: 0}}, ("alignment.layers.2 is 0.0", "positive")),
        ({"alignment.groups_per_step": 8}, ("unknown field alignment.groups_per_step", "words_per_step")),
        ({"alignment.train_iters": -1}, ("alignment.train_iters is -1", "non-negative")),
        ({"alignment.words_per_step": 1}, ("alignment.words_per_step is 1", "at least 2")),
        ({"alignment.words_per_step": "many"}, ("alignment.words_per_step is many", "integer")),
        ({"alignment.freeze": "middle"}, ("alignment.freeze is middle", "one of 'none', 'lower', 'upper'")),
        ({"alignment.language_weights": {"de": "x"}}, ("alignment.language_weights.de is x", "number")),
        ({"alignment.language_weights": {"de": 1}}, ("alignment.language_weights is {'de': 1.0}", "two languages")),
        ({"alignment.frequency_exponent": "x"}, ("alignment.frequency_exponent is x", "number")),
        ({"alignment.languages_per_group": 1}, ("alignment.languages_per_group is 1", "null", "at least 2")),
        ({"alignment.word_micro_batch_size": 0}, ("alignment.word_micro_batch_size is 0", "null", "positive")),
        ({"alignment_guard": {"every": 2}}, ("unknown field alignment_guard.every", "interval, floor")),
        ({"alignment_guard": {"interval": 0}}, ("alignment_guard.interval is 0", "positive")),
        ({"alignment_guard": {"floor": "low"}}, ("alignment_guard.floor is low", "number")),
        ({"code_switch.ratio": 1.5}, ("code_switch.ratio is 1.5", "[0, 1]")),
        ({"code_switch.label_mode": "all"}, ("code_switch.label_mode is all", "one of 'input_only', ")),
        ({"code_switch.language_weights": {"de": "x"}}, ("code_switch.language_weights.de is x", "number")),
        ({"dictionary.held_out_fraction": 2}, ("dictionary.held_out_fraction is 2.0", "[0, 1)")),
        ({"model.num_layers": "two"}, ("model.num_layers is two", "integer")),
        ({"model.num_layers": 2.5}, ("model.num_layers is 2.5", "integer")),
        ({"model.family": "bert"}, ("model.family is bert", "one of 'llama', 'mistral', 'qwen2', 'qwen3', 'gpt2'")),
        (
            {"model.family": "mistral", "model.sliding_window": 7},
            ("data.seq_length is 16", "at most model.sliding_window (7)"),
        ),
        (
            {"model.rope_scaling": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 0.5}},
            ("model.rope_scaling.high_freq_factor is 0.5", "low_freq_factor (1.0)"),
        ),
        (
            {"model.rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            ("model.rope_scaling.rope_type is yarn", "one of"),
        ),
        ({"model": "small"}, ("model is small", "section")),
        ({"model.num_layers": 0}, ("model.num_layers is 0", "positive")),
        ({"training.eval_interval": "x"}, ("training.eval_interval is x", "integer")),
        ({"data.eod_mask_loss": "maybe"}, ("data.eod_mask_loss is maybe", "true or false")),
        ({"data.reset_position_ids": 1}, ("data.reset_position_ids is 1", "true or false")),
        ({"data.reset_attention_mask": "x"}, ("data.reset_attention_mask is x", "true or false")),
        ({"data.sources": "en"}, ("data.sources is en", "list")),
        ({"data.sources": ["en"]}, ("data.sources[0] is en", "section")),
        ({"data.sources": [{"path": "a"}]}, ("data.sources[0].language", "required")),
        # YAML reads the code of Norwegian as a boolean.
        (
            {"data.sources": [{"path": "a", "language": False}]},
            ("data.sources[0].language is false", "in quotes"),
        ),
        ({"data.sources": [{"path": "a", "language": "b", "weight": "x"}]}, ("data.sources[0].weight is x", "number")),
        ({"data.tokenizer": None}, ("data.tokenizer", "required")),
        ({"optimizer": None}, ("optimizer.lr", "required")),
    ],
)
def test_messages_name_file_field_value_and_expectation(
    tmp_path: Path, changes: dict[str, Any], facts: tuple[str, ...]
) -> None:
    config = write_recipe(tmp_path, changes)
    message = error_of(["--config", config])
    assert message.startswith(f"recipe {config}: ")
    assert_facts(message, *facts)


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("model: {num_layers: 2\nfoo: [", ("line 2, column 4", "YAML", "did not find expected ',' or '}'")),
        ("model:\n\tnum_layers: 2\n", ("line 2", "indentation", "a tab", "spaces")),
        ("", ("empty", "`model:`", "`data:`")),
        ("hello\n", ("hello", "`model:`", "`data:`")),
        ("- 1\n", ("[1]", "`model:`", "`data:`")),
    ],
)
def test_file_that_is_not_a_recipe(tmp_path: Path, text: str, facts: tuple[str, ...]) -> None:
    config = tmp_path / "broken.yaml"
    config.write_text(text)
    message = error_of(["--config", str(config)])
    assert message.startswith(f"recipe {config}: ")
    assert_facts(message, *facts)


def test_file_that_is_not_text(tmp_path: Path) -> None:
    config = tmp_path / "picture.yaml"
    config.write_bytes(b"model:\n  # f\xfcr\n")
    message = error_of([f"--config={config}"])
    assert message.startswith(f"recipe {config}: ")
    assert_facts(message, "line 2, column 6", "0xfc", "UTF-8")


def test_config_that_is_not_a_file(tmp_path: Path) -> None:
    assert_facts(error_of(["--config", str(tmp_path)]), tmp_path, "is a directory")
    missing = error_of(["--config", str(tmp_path / "missing.yaml")])
    assert "file not found" in missing
    assert "missing.yaml" in missing
    assert "--config needs a value" in error_of(["--config"])


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--model.foo", "1"], ("--model.foo",)),
        (["--model.num_layers", "x"], ("model.num_layers is x", "integer")),
        (["--model.num_layers=0"], ("model.num_layers is 0", "positive")),
        (["--alignment.train_iters", "x"], ("alignment.train_iters is x", "integer")),
        (["--alignment.foo", "1"], ("unknown", "alignment.foo")),
        (["stray"], ("stray",)),
    ],
)
def test_messages_about_options(tmp_path: Path, options: list[str], facts: tuple[str, ...]) -> None:
    assert_facts(error_of(["--config", write_recipe(tmp_path), *options]), *facts)


def test_empty_recipe_names_every_required_field() -> None:
    message = error_of(["--training.precision", "fp32"])
    required = ("model.num_layers", "data.sources", "optimizer.lr", "training.seed", "logging.run_dir")
    assert_facts(message, *required, "required")
    assert_facts(error_of([]), "no recipe", "--config FILE")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dictionary": None, "alignment": None, "code_switch": None},
        {
            "data.validation": [{"path": "v", "language": "zh_hant"}],
            "alignment.layers": [0, 5],
            "alignment.stop_at_p_at_1": 0.9,
            "training.eval_interval": 3,
            "alignment_guard": {"interval": 4, "floor": 0.25},
            "alignment_watch": {"interval": 10},
            "code_switch.language_weights": {"de": 0.5, "fr": 1e-5},
            "parallel.tensor_model_parallel_size": 2,
            "training.train_iters": None,
            "training.train_tokens": 10**12,
            "optimizer.adam_eps": 1e-15,
            "checkpoint.load": "elsewhere",
        },
        {
            "alignment.layers": {0: 1, 5: 2.5},
            "alignment.freeze": "upper",
            "alignment.projection_size": 8,
            "alignment.languages_per_group": 2,
            "alignment.language_weights": {"de": 0.5, "fr": 1e-5},
            "alignment.frequency_exponent": 0.3,
            "alignment.word_micro_batch_size": 16,
        },
        {"alignment.layers": "1-4", "alignment.train_iters": 0, "alignment_guard": {"interval": 1}},
    ],
)
def test_saved_recipe_loads_as_an_equal_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = load_recipe(["--config", write_recipe(tmp_path, changes)])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(["--config", str(tmp_path / "saved.yaml")]) == recipe


def test_a_run_directory_may_look_like_a_number(tmp_path: Path) -> None:
    recipe = load_recipe(["--config", write_recipe(tmp_path), "--logging.run_dir", "1e3"])
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(["--config", str(tmp_path / "saved.yaml")]).logging.run_dir == "1e3"


def test_no_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from megatron_prealign.recipe import load_recipe, save_recipe; import pathlib; "
        "save_recipe(load_recipe(sys.argv[1:]), pathlib.Path(sys.argv[2] + '.saved')); "
        "print([name for name in ('torch', 'numpy', 'megatron', 'transformers') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "--config", write_recipe(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("section", ["parallel", "checkpoint"])
def test_an_empty_section_with_defaults(tmp_path: Path, section: str) -> None:
    """As if all fields of the section were commented out."""
    empty = tmp_path / "empty.yaml"
    empty.write_text(f"{section}:\noptimizer: {{lr: 0.1}}\n")
    message = error_of(["--config", write_recipe(tmp_path), "--config", str(empty)])
    assert_facts(message, "empty.yaml", f"{section} is null", "remove the section")
