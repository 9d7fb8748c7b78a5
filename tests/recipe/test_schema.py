"""The JSON schema for editors accepts the example recipes and finds the errors that `pretrain` would report."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from megatron_prealign.recipe.describe import walk
from megatron_prealign.recipe.recipe import Recipe
from megatron_prealign.recipe.schema import recipe_schema

# A study is no recipe.
EXAMPLES = sorted(path for path in Path("examples").glob("*/*.yaml") if not path.name.startswith("study"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    parsed = json.loads(recipe_schema())
    jsonschema.Draft202012Validator.check_schema(parsed)
    return parsed


def errors_in(schema: dict[str, Any], recipe: Any) -> list[str]:
    return [each.message for each in jsonschema.Draft202012Validator(schema).iter_errors(recipe)]


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_examples_are_valid(schema: dict[str, Any], path: Path) -> None:
    assert errors_in(schema, yaml.safe_load(path.read_text())) == []


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize(
    ("values", "fact"),
    [
        ({"model": {"num_layer": 3}}, "num_layer"),
        ({"modle": {}}, "modle"),
        ({"data": {"sources": [{"path": "data/en"}]}}, "language"),
        ({"model": {"family": "lama"}}, "lama"),
        ({"training": {"seed": "x"}}, "'x' is not of type 'integer'"),
        ({"data": {"sources": [{"path": "p"}]}}, "'language' is a required property"),
        ({"alignment": {"train_iters": 1.5}}, "1.5"),
        ({"code_switch": {"label_mode": "input-only"}}, "input-only"),
    ],
)
def test_errors_are_found(schema: dict[str, Any], values: dict[str, Any], fact: str) -> None:
    recipe: dict[str, Any] = {}
    for section, fields in copy.deepcopy(values).items():
        recipe.setdefault(section, {}).update(fields)
    (error, *rest) = errors_in(schema, recipe)
    assert fact in error and not rest


def test_sections_may_be_omitted(schema: dict[str, Any]) -> None:
    for recipe in (
        {},
        {"optimizer": {"lr": 1e-3}},
        {"alignment": None},
        {"alignment": {"lr": 1}},
        {"model": {"rope_scaling": {"factor": 2}}},
    ):
        assert errors_in(schema, recipe) == []


def test_every_field_is_described_on_one_line(schema: dict[str, Any]) -> None:
    def fields_of(part: dict[str, Any], prefix: str) -> Any:
        for choice in part.get("anyOf", [part]):
            if "$ref" in choice:
                choice = schema["$defs"][choice["$ref"].rpartition("/")[2]]
            for name, field in choice.get("properties", {}).items():
                yield f"{prefix}{name}", field
                yield from fields_of(field, f"{prefix}{name}.")

    described = {path: field.get("description", "") for path, field in fields_of(schema, "")}
    for path, _ in walk(Recipe):
        assert described[path] and "\n" not in described[path], path
