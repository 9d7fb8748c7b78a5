"""Directories of a run: nothing of the user is replaced, and what cannot be written is found before training."""

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts, assert_refused, user_error
from support.recipe_values import write_recipe
from support.tiny import Tiny

from megatron_prealign import cli
from megatron_prealign.recipe import Recipe, load_recipe, save_recipe
from megatron_prealign.run.directory import lock_run_directory
from megatron_prealign.run.output_paths import check_output_paths


def recipe_in(directory: Path, **changes: Any) -> Recipe:
    """A recipe whose file is in `directory`, with the run directory `run` in it."""
    values = {"logging.run_dir": str(directory / "run"), **{name.replace("__", "."): changes[name] for name in changes}}
    return load_recipe(["--config", write_recipe(directory, values, "mine.yaml")])


def content(directory: Path) -> dict[str, bytes | None]:
    """Every file and directory below `directory`."""
    return {str(each): each.read_bytes() if each.is_file() else None for each in directory.rglob("*")}


def test_a_new_directory_and_one_of_a_run_are_accepted_and_left_alone(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    check_output_paths(recipe)
    run = tmp_path / "run"
    run.mkdir()
    # Output of a scheduler, and what a run writes.
    (run / "slurm-17.out").write_text("started\n")
    save_recipe(recipe, run / "recipe.yaml")
    (run / "versions.json").write_text(json.dumps({"megatron-prealign": "1"}))
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run / "checkpoints" / "latest").write_text("garbage")
    before = content(tmp_path)
    check_output_paths(recipe)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.yaml", "# my notes\nmodel: {num_layers: 2}\n"),
        ("recipe.yaml", "model:\n  num_layers: 2\n"),
        ("recipe.yaml", "\xff"),
        ("versions.json", "{}"),
        ("versions.json", "[1]"),
        ("metrics.jsonl", '{"loss": 3}\n'),
        ("checkpoints/latest", "my notes"),
    ],
)
def test_files_of_the_user_are_not_replaced(tmp_path: Path, name: str, text: str) -> None:
    recipe = recipe_in(tmp_path)
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="latin-1")
    before = content(tmp_path)
    with user_error(file.parent, file.name, "new directory"):
        check_output_paths(recipe)
    with user_error(file.name), ExitStack() as locks:
        lock_run_directory(recipe, locks)
    assert content(tmp_path) == before


def test_a_saved_recipe_with_added_comments_is_the_users(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / "recipe.yaml"
    save_recipe(recipe, file)
    file.write_text("# lr from the paper\n" + file.read_text())
    with user_error("recipe.yaml", "no run wrote"):
        check_output_paths(recipe)


@pytest.mark.parametrize("field", ["logging.run_dir", "checkpoint.directory", "data.cache"])
@pytest.mark.parametrize(
    ("path", "fact"),
    [
        ("mine.yaml", "is a file"),
        ("mine.yaml/below", "is a file"),
        ("/proc/nowhere", "cannot write"),
        ("x" * 300, "File name too long"),
        ("", "empty"),
        ("~/runs", "~"),
    ],
)
def test_what_cannot_be_a_directory_names_its_field(tmp_path: Path, field: str, path: str, fact: str) -> None:
    place = path if path[:1] in ("", "~", "/") else str(tmp_path / path)
    recipe = recipe_in(tmp_path, **{field.replace(".", "__"): place})
    before = content(tmp_path)
    with user_error(field, fact, path):
        check_output_paths(recipe)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "profile", "checkpoints", "cache"])
def test_a_file_in_place_of_a_directory_of_the_run(tmp_path: Path, name: str) -> None:
    recipe = recipe_in(tmp_path, logging__tensorboard=True, logging__wandb=True, logging__profile_steps=[1, 2])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with user_error("logging.run_dir", tmp_path / "run" / name, "is a file"):
        check_output_paths(recipe)
    (tmp_path / "run" / name).rename(tmp_path / "away")
    check_output_paths(recipe)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o500)
    with user_error("logging.run_dir", "Permission denied"):
        check_output_paths(recipe_in(tmp_path))


def test_a_prepared_cache_may_be_read_only(tmp_path: Path) -> None:
    # /proc stands for a read-only disk; nobody can write there, root included.
    with user_error("data.cache", "/proc/sys"):
        check_output_paths(recipe_in(tmp_path, data__cache="/proc/sys"))
    (tmp_path / "cache" / "blend-0").mkdir(parents=True)
    check_output_paths(recipe_in(tmp_path, data__cache=str(tmp_path / "cache")))


def test_validation_finds_them_and_creates_nothing(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"

    def validate(**sections: dict[str, Any]) -> int:
        values = tiny.values(Path("new") / "run")
        for name, fields in sections.items():
            values[name] = {**values.get(name, {}), **fields}
        recipe.write_text("# mine\n" + json.dumps(values))
        return cli.main(["pretrain", "--config", "recipe.yaml", "--validate"])

    assert validate() == 0
    assert_facts(capsys.readouterr().out, "valid")
    for sections, facts in (
        ({"logging": {"run_dir": "."}}, ("logging.run_dir .", "recipe.yaml")),
        ({"logging": {"run_dir": "recipe.yaml"}}, ("logging.run_dir", "is a file")),
        ({"checkpoint": {"keep_best": "validation_loss/fr"}}, ("checkpoint.keep_best", "validation_loss/en_clone")),
        ({"checkpoint": {"keep_best": "word_retrieval/x"}}, ("word_retrieval_p_at_1_held_out/en-en_clone",)),
    ):
        assert_refused(validate(**sections), capsys.readouterr().err, *facts)
    assert validate(checkpoint={"keep_best": "validation_loss/en"}) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"]
