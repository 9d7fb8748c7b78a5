"""A resumed run lists the fields that differ from its checkpoint's recipe, and says when nothing is left to train."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support.messages import assert_facts
from support.recipe_values import write_recipe
from support.tiny import Tiny, recipe_of
from support.whole_runs import language_model_values, run, steps_in, train_logged
from support.workers import WorkerPool

from megatron_prealign.checkpoint.resume.changes import _EFFECTS, _SCHEDULES, changed_fields, describe_changes, effect
from megatron_prealign.recipe import DataSource, Recipe, load_recipe, recipe_to_dict, save_recipe
from megatron_prealign.run.validate import validate


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A recipe that is saved as that of the checkpoint `tmp_path`."""
    recipe = load_recipe(
        ["--config", write_recipe(tmp_path, {"code_switch.language_weights": {"de": 1.0}}, "own.yaml")]
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    return recipe


def test_an_equal_recipe_has_no_changes(recipe: Recipe, tmp_path: Path) -> None:
    assert changed_fields(recipe, tmp_path) == {}
    # A checkpoint of another tool, and one that is corrupt: state.json decides.
    (tmp_path / "recipe.yaml").write_text("a: 1\na: 2\n")
    assert changed_fields(recipe, tmp_path) == {}
    assert changed_fields(recipe, tmp_path / "nowhere") == {}


def test_a_field_newer_than_the_checkpoint_has_its_default(recipe: Recipe, tmp_path: Path) -> None:
    saved = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    # Has a default that is no constant, a constant, one in an item of a list, one of a whole section, and none.
    for section, name in (("code_switch", "source_languages"), ("model", "rotary_base"), ("model", "hidden_size")):
        del saved[section][name]
    del saved["data"]["sources"][0]["weight"], saved["alignment_watch"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(saved))
    assert list(changed_fields(recipe, tmp_path)) == ["model.hidden_size"]
    changed = replace(recipe, model=replace(recipe.model, rotary_base=5.0))
    assert changed_fields(changed, tmp_path)["model.rotary_base"] == ("not set", "5.0")


def test_fields_of_every_depth(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.code_switch is not None
    source = recipe.data.sources[0]
    changed = replace(
        recipe,
        optimizer=replace(recipe.optimizer, lr=0.0005),
        data=replace(
            recipe.data, sources=[replace(source, weight=2.0), DataSource(path="de", language="de")], eod_mask_loss=True
        ),
        code_switch=replace(recipe.code_switch, language_weights={"fr": 1.0}),
        alignment=None,
    )
    changes = changed_fields(changed, tmp_path)
    assert changes.pop("alignment")[1] == "null"
    assert changes.pop("data.sources[1]")[0] == "not set"
    assert changes == {
        "optimizer.lr": ("0.001", "0.0005"),
        "data.sources[0].weight": ("1.0", "2.0"),
        "data.eod_mask_loss": ("false", "true"),
        "code_switch.language_weights.de": ("1.0", "not set"),
        "code_switch.language_weights.fr": ("not set", "1.0"),
    }


def test_a_line_per_field_with_its_effect(recipe: Recipe, tmp_path: Path) -> None:
    changed = replace(recipe, optimizer=replace(recipe.optimizer, lr=0.0005, adam_eps=1e-6))
    rate, epsilon = describe_changes(changed, tmp_path, 1200, "language_model")
    assert_facts(rate, "optimizer.lr: 0.001 -> 0.0005", "step 1,200", "schedule")
    assert_facts(epsilon, "optimizer.adam_eps: 1e-08 -> 1e-06", "no effect")


def test_a_phase_that_is_over_is_not_affected() -> None:
    assert "no effect" in effect("alignment.lr", "language_model", has_guard=False)
    assert effect("alignment.lr", "language_model", has_guard=True) == ""
    assert effect("alignment.lr_warmup_iters", "alignment", has_guard=False).startswith("the learning-rate schedule")
    assert effect("logging.log_interval", "language_model", has_guard=False) == ""


def test_fields_whose_names_begin_alike_have_effects_of_their_own(recipe: Recipe) -> None:
    def effect_of(field: str, phase: str = "language_model") -> str:
        return effect(field, phase, has_guard=False)

    assert "schedule" in effect_of("optimizer.lr_warmup_iters")
    # The schedule of a later phase has not begun.
    assert_facts(effect_of("optimizer.lr_warmup_iters", "alignment"), "language_model begins")
    assert "checkpoint of its own" in effect_of("checkpoint.load_parts")
    assert "not consumed" in effect_of("data.sources[1].weight")
    for field in ("checkpoint.load_more", "optimizer.lr_x", "training.train_x", "optimizer.adam_x", "data.sources_x"):
        assert effect_of(field) == ""
    names = {f"{section}.{name}" for section, fields in recipe_to_dict(recipe).items() for name in fields or ()}
    assert {*_EFFECTS, *_SCHEDULES["alignment"], *_SCHEDULES["language_model"]} <= names


@pytest.mark.slow
def test_a_complete_run_has_nothing_to_do(tiny: Tiny, workers: WorkerPool, tmp_path: Path) -> None:
    values = language_model_values(tiny, tmp_path / "run")
    values["training"]["train_iters"] = 2
    run(workers, 1, values, tmp_path)
    values["optimizer"]["lr"] = 5e-4
    validated = validate(recipe_of(values, tmp_path)).splitlines()
    (lines,) = workers.run(1, train_logged, values, str(tmp_path))
    assert validated[-2:] == [line for line in lines if "optimizer.lr:" in line or "nothing to do" in line]
    change = next(line for line in lines if line.startswith("optimizer.lr:"))
    assert_facts(change, "0.001 -> 0.0005", "step 2")
    end = next(line for line in lines if "nothing to do" in line)
    assert_facts(end, "2 of 2 steps", "training.train_iters", "no effect")
    values["training"]["train_iters"] = 3
    assert "nothing to do" not in validate(recipe_of(values, tmp_path))
    (lines,) = workers.run(1, train_logged, values, str(tmp_path))
    assert not [line for line in lines if "nothing to do" in line]
    assert [line for line in lines if line.startswith("training.train_iters: 2 -> 3")]


@pytest.mark.slow
def test_a_complete_run_of_a_token_budget_has_nothing_to_do(tiny: Tiny, workers: WorkerPool, tmp_path: Path) -> None:
    values = tiny.values(tmp_path / "run")
    values["alignment"]["train_iters"] = 1
    values["alignment_guard"] = {"interval": 2}
    values["training"].update(train_iters=None, train_tokens=4000)
    run(workers, 1, values, tmp_path)
    (name,) = steps_in(tmp_path / "run")[-1:]
    state = json.loads((tmp_path / "run" / "checkpoints" / name / "state.json").read_text())
    # The words of the last steps need not fill the budget, so the tokens do not tell that the run is complete.
    assert state["train_state"]["tokens"] != 4000 and state["phase_over"]
    (lines,) = workers.run(1, train_logged, values, str(tmp_path))
    (end,) = [line for line in lines if "nothing to do" in line]
    assert end in validate(recipe_of(values, tmp_path)).splitlines()
    for change in ({"train_tokens": 8000}, {"train_tokens": 8000, "global_batch_size": 4}):
        values["training"].update(change)
        assert "nothing to do" not in validate(recipe_of(values, tmp_path))
