"""The YAML of a recipe against its fields: line, index and value of what is wrong, for every field of the kind."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.messages import user_error
from support.recipe_values import write_recipe

from megatron_prealign.files.yaml_text import YamlError
from megatron_prealign.recipe import Recipe, RecipeValueError, load_recipe
from megatron_prealign.recipe.describe import walk
from megatron_prealign.recipe.document import check_document, check_value, field_type

NUMERIC = [name for name, field in walk(Recipe) if "INT" in field.metavar or "NUMBER" in field.metavar]
MAPPINGS = {"alignment.layers": "0", "alignment.language_weights": "de"}
MAPPINGS |= {"code_switch.language_weights": "de", "code_switch.language_ratios": "de"}


def numeric_field(name: str, number: str) -> str:
    """The value of a numeric field: a number, or a mapping or a list with one."""
    if name == "logging.profile_steps":
        return f"[1, {number}]"
    return f"{{{MAPPINGS[name]}: {number}}}" if name in MAPPINGS else number


# More than a 64-bit integer or a float64 can hold, and what is no number.
@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e400", "9" * 400, "-9223372036854775809"])
def test_every_numeric_field_is_finite_in_a_file_and_as_an_option(number: str) -> None:
    assert len(NUMERIC) > 70
    for name in NUMERIC:
        *sections, last = name.split(".")
        text = f"{last}: {numeric_field(name, number)}"
        for section in reversed(sections):
            text = f"{section}: {{{text}}}"
        with user_error("line 1", name, number[:20], "number", kind=RecipeValueError):
            check_document(text, Recipe)
        with user_error(name, number[:20], "number", kind=RecipeValueError):
            check_value(numeric_field(name, number), field_type(name), name)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan, 1e300, 10**400])
def test_a_recipe_built_in_python_is_finite_too(tmp_path: Path, number: float) -> None:
    recipe = load_recipe(["--config", write_recipe(tmp_path, {"code_switch.language_weights": {"de": 1.0, "fr": 2.0}})])
    assert recipe.code_switch is not None
    with user_error("optimizer.clip_grad", "number", kind=RecipeValueError):
        replace(recipe, optimizer=replace(recipe.optimizer, clip_grad=number))
    with user_error("code_switch.language_weights.fr", "number", kind=RecipeValueError):
        replace(recipe, code_switch=replace(recipe.code_switch, language_weights={"de": 1.0, "fr": number}))
    with user_error("data.sources[", "number", kind=RecipeValueError):
        replace(recipe, data=replace(recipe.data, sources=[replace(recipe.data.sources[0], weight=number)]))


@pytest.mark.parametrize(
    "name", ["checkpoint.timeout_minutes", "parallel.distributed_timeout_minutes", "training.exit_after_minutes"]
)
def test_timeouts_fit_in_timers(tmp_path: Path, name: str) -> None:
    with user_error(name, "1e+16", "at most 5,256,000"):
        load_recipe(["--config", write_recipe(tmp_path, {name: 1e16})])


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("model: {num_layers: 2}\ndata: {}\nmodel: {}\n", ("line 3", "model is already defined (line 1)")),
        ("optimizer: {lr: 1}\noptimizer.lr: 2\n", ("line 2", "optimizer.lr is already defined (line 1)")),
        (
            "data:\n  sources:\n  - {path: a, language: en}\n  - path: b\n    language: de\n    wieght: 2\n",
            ("line 6", "data.sources[1].wieght", "did you mean weight?"),
        ),
        (
            "data:\n  sources:\n  - {path: a, language: no}\n",
            ("line 3", "[0].language is no", "false", "quotes"),
        ),
        ("data:\n  sources:\n  - {path: a}\n  - b\n", ("line 3", "data.sources[0].language", "required")),
        ("model: {rope_scaling: {factr: 2}}\n", ("model.rope_scaling.factr", "did you mean factor?")),
        ("optimizr.lr: 2\n", ("unknown field optimizr", "did you mean optimizer?")),
        ("code_switch: {ratio: on}\n", ("code_switch.ratio is on", "reads as true", "a number")),
        ("training: {seed: 010}\n", ("training.seed is 010", "reads as 8", "decimal")),
        ("checkpoint: {timeout_minutes: 1:30}\n", ("checkpoint.timeout_minutes is 1:30", "reads as 90", "decimal")),
        ("logging: {run_dir: 2024}\n", ("logging.run_dir is 2024", "string", "quotes")),
        ("logging: {run_dir: [a, b]}\n", ("logging.run_dir is ['a', 'b']", "string")),
        ("training: {micro-batch-size: 1}\n", ("training.micro-batch-size", "did you mean micro_batch_size?")),
        ("optimizer:\n  lr: 2,0e-3\n", ("line 2", "optimizer.lr is 2,0e-3", "a number; write 2.0e-3")),
        ("checkpoint: {keep: true}\n", ("checkpoint.keep is true", "an integer")),
        ("training: {precision: fp16}\n", ("training.precision is fp16", "'bf16', 'fp32'")),
        ("code_switch: {language_weights: [de]}\n", ("code_switch.language_weights is ['de']", "mapping")),
        ("code_switch: {language_weights: {no: 1}}\n", ("language_weights has the key no", "reads as false", "quotes")),
        ("code_switch: {language_weights: {null: 1}}\n", ("language_weights has the key null", "a string")),
        ("alignment: {layers: {a: 1}}\n", ("alignment.layers has the key a", "an integer")),
        ('logging: {run_dir: "a\\0"}\n', ("logging.run_dir is 'a\\x00'", "NUL")),
        ('code_switch: {source_languages: [de, "a\\0"]}\n', ("code_switch.source_languages[1] is 'a\\x00'", "NUL")),
        ('code_switch: {language_weights: {"a\\0": 1}}\n', ("language_weights is 'a\\x00'", "NUL")),
    ],
)
def test_message_names_line_field_and_what_yaml_made_of_it(text: str, facts: tuple[str, ...]) -> None:
    with user_error(*facts, kind=(YamlError if "model is already" in facts[1] else RecipeValueError)):
        check_document(text, Recipe)


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: &o {lr: 1e-3}\nalignment: {<<: *o, lr: 2e-3}\n",
        "optimizer.lr: '0.5'\ntraining: {train_tokens: 1_000_000, seed: 0x10}\n",
        "alignment: {layers: 2-5}\ncode_switch: null\nmodel:\n",
        "data: {sources: [{path: a, language: 'no', weight: 1}], validation: []}\n",
    ],
)
def test_what_yaml_allows_is_accepted(text: str) -> None:
    check_document(text, Recipe)


@pytest.mark.parametrize(
    ("option", "value", "facts"),
    [
        ("data.sources", "[{path: a, language: b, path: c}]", ("data.sources", "[0].path is already defined")),
        ("data.sources", "[{path: a, language: b}, {path: c, lang: d}]", ("data.sources[1].lang", "language?")),
        ("data.sources+", "{path: a, language: b, weight: x}", ("data.sources.weight is x", "a number")),
        ("model", "{num_layers: 1, num_layers: 2}", ("model", "num_layers is already defined")),
        ("alignment.layers", "{0: 1, 2: .inf}", ("alignment.layers.2 is .inf", "finite")),
        ("code_switch.language_weights.de", ".nan", ("code_switch.language_weights.de is .nan", "finite")),
        ("optimizer.lr", "x", ("optimizer.lr is x", "a number")),
    ],
)
def test_values_of_options(option: str, value: str, facts: tuple[str, ...], tmp_path: Path) -> None:
    config = write_recipe(tmp_path)
    with user_error(f"recipe {config}", *facts) as caught:
        load_recipe(["--config", config, f"--{option}", value])
    assert ": line " not in str(caught.value)


def test_the_file_of_a_section_is_checked_too(tmp_path: Path) -> None:
    file = tmp_path / "optimizer.yaml"
    file.write_text("lr: 0.1\nmin_lr: 0.2\nlr: 0.3\n")
    with user_error(file, "line 3", "lr is already defined (line 1)"):
        load_recipe(["--config", write_recipe(tmp_path), "--optimizer", str(file)])


@pytest.mark.parametrize("language", ["../../x", "a/b", "", "de en", "d\n", ".de", "x" * 64])
def test_languages_of_sources_are_codes(tmp_path: Path, language: str) -> None:
    for name in ("sources", "validation"):
        sources = [{"path": "a", "language": "en"}, {"path": "b", "language": language}]
        with user_error(f"data.{name}[1].language", "language code"):
            load_recipe(["--config", write_recipe(tmp_path, {f"data.{name}": sources})])
