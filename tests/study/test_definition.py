"""The file of a study: what it may contain, and errors with their place."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.messages import user_error

from megatron_prealign.study.definition import load_study

STUDY: dict[str, Any] = {
    "output": "runs/x",
    "base": ["base.yaml"],
    "seeds": [1, 2],
    "runs": [{"name": "joint"}, {"name": "aligned", "recipes": ["a.yaml"], "set": {"optimizer.lr": 1e-3}}],
}


def write(directory: Path, **changes: Any) -> str:
    path = directory / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}), encoding="utf-8")
    return str(path)


def test_what_a_file_says(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, processes=3))
    assert (study.output, study.base, study.seeds, study.processes) == ("runs/x", ["base.yaml"], [1, 2], 3)
    joint, aligned = study.runs
    assert (joint.recipes, joint.set, joint.control) == ([], {}, None)
    assert (aligned.recipes, aligned.set) == (["a.yaml"], {"optimizer.lr": 1e-3})


def test_quick_changes_seeds_runs_fields_and_output(tmp_path: Path) -> None:
    quick = {"seeds": [5, 6, 7], "runs": ["aligned"], "set": {"training.train_iters": 9}}
    path = write(tmp_path, quick=quick)
    assert len(load_study(path).runs) == 2
    study = load_study(path, quick=True)
    assert (study.output, study.seeds, [run.name for run in study.runs]) == ("runs/x-quick", [5, 6, 7], ["aligned"])
    assert study.runs[0].set == {"optimizer.lr": 1e-3, "training.train_iters": 9}


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"seed": [1]}, ("unknown field seed", "did you mean seeds?")),
        ({"seeds": ["a"]}, ("seeds is ['a']", "a list")),
        ({"seeds": [1]}, ("seeds has 1, expected at least 2", "standard deviation")),
        ({"seeds": [1, 2, 1]}, ("seeds has 1 more than once",)),
        ({"runs": [{"name": "a"}, {"name": "a"}]}, ("runs has a more than once",)),
        ({"runs": [{"name": "a/b"}]}, ("runs[0].name is a/b", "letters")),
        ({"runs": [{"recipes": []}]}, ("runs[0].name", "required")),
        ({"runs": [{"name": "a", "control": "b"}]}, ("runs[0].control is b", "another run")),
        ({"runs": [{"name": "a", "control": "a"}]}, ("runs[0].control is a", "another run")),
        ({"runs": [{"name": "a", "set": {"training.seed": 1}}]}, ("runs[0].set has training.seed",)),
        ({"processes": 0}, ("processes is 0", "positive")),
        ({"output": None, "base": None}, ("output, base are required",)),
        ({"quick": {"runs": ["x"]}}, ("quick.runs has x", "names of runs")),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, Any], facts: tuple[str, ...]) -> None:
    path = write(tmp_path, **changes)
    with user_error(f"study {path}", *facts):
        load_study(path, quick="quick" in changes)


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("runs: [\n")
    with user_error(str(path), "line 2"):
        load_study(str(path))
    path.write_text("")
    with user_error(str(path), "output, base, seeds, runs are required"):
        load_study(str(path))
