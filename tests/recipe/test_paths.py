"""Paths are relative to the current directory; a recipe run from elsewhere says so."""

from pathlib import Path

import pytest
from support.messages import user_error
from support.recipe_values import write_recipe

from megatron_prealign.recipe import load_recipe
from megatron_prealign.recipe.paths import check_relative_paths


@pytest.mark.parametrize(
    ("field", "file"),
    [
        ("data.tokenizer", "tok"),
        ("data.sources[0].path", "en.idx"),
        ("data.validation[0].path", "valid.idx"),
        ("data.parallel_text[0].source", "pairs_en.idx"),
        ("data.parallel_text[0].target", "pairs_de.idx"),
        ("dictionary.table", "table.safetensors"),
        ("checkpoint.load", "base"),
    ],
)
def test_inputs_next_to_the_recipe_instead_of_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, file: str
) -> None:
    place, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    place.mkdir()
    elsewhere.mkdir()
    changes = {"data.validation": [{"path": "valid", "language": "en"}], "checkpoint.load": "base"}
    changes["data.parallel_text"] = [{"source": "pairs_en", "target": "pairs_de"}]
    config = write_recipe(place, changes)
    recipe = load_recipe(["--config", config])
    monkeypatch.chdir(elsewhere)
    # Missing everywhere: whoever opens the file reports it.
    check_relative_paths(recipe, [config])
    (place / file).touch()
    with user_error(field, elsewhere, place, "relative to the current directory"):
        check_relative_paths(recipe, [config])
    (elsewhere / file).touch()
    check_relative_paths(recipe, [config])
    monkeypatch.chdir(place)
    check_relative_paths(recipe, ["recipe.yaml"])
