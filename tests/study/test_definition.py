"""The file of a study: what it may contain, and errors with their place."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.messages import user_error

from megatron_prealign.study.definition import load_study, sweep_file

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


def sweep(**at: dict[str, Any]) -> dict[str, Any]:
    """Change of a study: a run per name, with its points in sweeps."""
    return {"runs": [{"name": name, "at": values} for name, values in at.items()]}


def test_what_a_file_says(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, processes=3))
    assert (study.output, study.base, study.seeds, study.processes) == ("runs/x", ["base.yaml"], [1, 2], 3)
    joint, aligned = study.runs
    assert (joint.recipes, joint.set, joint.control) == ([], {}, None)
    assert (aligned.recipes, aligned.set) == (["a.yaml"], {"optimizer.lr": 1e-3})


def test_quoted_numbers_are_numbers(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, seeds=["1", "02"], processes="2"))
    assert (study.seeds, study.processes) == ([1, 2], 2)


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
        ({"runs": [{"name": ""}]}, ("runs[0].name is empty", "letters")),
        ({"runs": [{"name": "a" * 101}]}, ("runs[0].name is aaa", "1 to 100 letters")),
        ({"base": ["a\0"]}, ("base[0] is 'a\\x00'", "NUL")),
        ({"runs": [{"name": "a", "recipes": ["a\0"]}]}, ("runs[0].recipes[0] is 'a\\x00'", "NUL")),
        ({"runs": [{"recipes": []}]}, ("runs[0].name", "required")),
        ({"runs": [{"name": "a", "control": "b"}]}, ("runs[0].control is b", "another run")),
        ({"runs": [{"name": "a", "control": "a"}]}, ("runs[0].control is a", "another run")),
        ({"runs": [{"name": "a"}, {"name": "b", "against": "c"}]}, ("runs[1].against is c", "another run")),
        ({"runs": [{"name": "a", "against": "b"}, {"name": "b"}]}, ("runs[0].against is b", "the first run")),
        ({"runs": [{"name": "a", "set": {"training.seed": 1}}]}, ("runs[0].set has training.seed",)),
        ({"runs": [{"name": "a", "set": {"help": True}}]}, ("runs[0].set has help", "fields of a recipe")),
        ({"seeds": [1, None]}, ("seeds has null",)),
        ({"seeds": ["1", 1]}, ("seeds has 1 more than once",)),
        ({"vary": [None]}, ("vary has null",)),
        ({"quick": {"runs": [None]}}, ("quick.runs has null",)),
        ({"runs": [{"name": "a", "recipes": [None]}]}, ("runs[0].recipes has null",)),
        ({"runs": []}, ("runs is empty", "at least one")),
        ({"output": ""}, ("output is empty", "directory of its own")),
        ({"output": "/"}, ("output is /", "directory of its own")),
        ({"vary": ["data.source"]}, ("vary has data.source", "names of fields")),
        ({"quick": {"seeds": [1]}}, ("quick.seeds has 1, expected at least 2",)),
        ({"quick": {"set": {"training.seed": 1}}}, ("quick.set has training.seed",)),
        ({"processes": 0}, ("processes is 0", "positive")),
        ({"output": None, "base": None}, ("output, base are required",)),
        ({"quick": {"runs": ["x"]}}, ("quick.runs has x", "names of runs")),
        (sweep(a={"lr": 1}), ("run a", "the sweep lr", "at least two")),
        (sweep(a={"lr": 1}, b={"lr": 1.0}), ("runs a and b", "both at 1", "the sweep lr")),
        (sweep(a={"lr": 1, "LR": 2}, b={"LR": 3, "lr": 4}), ("LR and lr", "sweep-lr.png")),
        (sweep(a={"?": 1}, b={"?": 2}), ("run a", "'?'", "letter or digit")),
        (sweep(a={"x" * 61: 1}, b={"x" * 61: 2}), ("run a", "60 characters")),
        # Letters of four bytes, as of Old Persian.
        (sweep(a={"\U000103a0" * 46: 1}, b={"\U000103a0" * 46: 2}), ("run a", "180 bytes")),
        (sweep(a={"x\ny": 1}, b={"x\ny": 2}), ("run a", r"'x\ny'")),
        (sweep(a={"lr": None}, b={"lr": 2}), ("runs[0].at.lr is null", "a number")),
        (sweep(a={"lr": "high"}, b={"lr": 2}), ("runs[0].at", "high")),
        (sweep(a={"lr": math.inf}, b={"lr": 2}), ("runs[0].at.lr", "finite")),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, Any], facts: tuple[str, ...]) -> None:
    path = write(tmp_path, **changes)
    with user_error(f"study {path}", *facts):
        load_study(path)


def test_sweeps_are_ordered_by_value(tmp_path: Path) -> None:
    path = write(tmp_path, **sweep(a={"lr": 3, "guard": 10}, b={"lr": "1e-3"}, c={"guard": 2, "lr": 0.5}))
    sweeps = load_study(path).sweeps
    assert {name: [(run.name, run.at[name]) for run in runs] for name, runs in sweeps.items()} == {
        "lr": [("b", 0.001), ("c", 0.5), ("a", 3.0)],
        "guard": [("c", 2.0), ("a", 10.0)],
    }
    assert load_study(write(tmp_path)).sweeps == {}


def test_a_sweep_without_a_name(tmp_path: Path) -> None:
    path = write(tmp_path, **sweep(a={"lr": 3, None: 1}, b={"lr": 1}))
    with user_error(f"study {path}", "runs[0].at has the key null", "a string"):
        load_study(path)


def test_quick_may_leave_a_sweep_with_one_run(tmp_path: Path) -> None:
    runs = sweep(a={"lr": 3, "guard": 10}, b={"lr": 1}, c={"guard": 2})
    path = write(tmp_path, **runs, quick={"runs": ["a", "c"]})
    assert list(load_study(path, quick=True).sweeps) == ["guard"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("guard interval", "sweep-guard-interval"),
        ("LR (x10)", "sweep-lr-x10"),
        ("学習率", "sweep-学習率"),
        ("a/../b", "sweep-a-b"),
    ],
)
def test_files_of_sweeps(name: str, file: str) -> None:
    assert sweep_file(name) == file


def test_quick_may_leave_a_control_out(tmp_path: Path) -> None:
    runs = [{"name": "joint"}, {"name": "aligned", "control": "shuffled"}, {"name": "shuffled"}]
    path = write(tmp_path, runs=runs, quick={"runs": ["joint", "aligned"]})
    assert [run.control for run in load_study(path).runs] == [None, "shuffled", None]
    assert [run.control for run in load_study(path, quick=True).runs] == [None, None]


def test_studies_in_the_documentation_are_valid(tmp_path: Path) -> None:
    """With --quick, too."""
    root = Path(__file__).parents[2]
    (block,) = re.findall(r"```yaml\n(.*?)```", (root / "docs" / "study.md").read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "study.yaml"
    path.write_text(block, encoding="utf-8")
    for file in (path, root / "examples" / "english_clone" / "study.yaml"):
        assert len(load_study(str(file)).seeds) == 3
        assert len(load_study(str(file), quick=True).seeds) == 2


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", sorted(Path("examples").glob("*/study*.yaml")), ids=str)
def test_the_examples(path: Path, quick: bool) -> None:
    study = load_study(str(path), quick=quick)
    assert all(Path(file).is_file() for run in study.runs for file in [*study.base, *run.recipes])
    # Their data is not there, so a run is a recipe only up to its control.
    assert {run.control for run in study.runs} - {None} <= {run.name for run in study.runs}


def test_a_file_that_is_no_yaml(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("runs: [\n")
    with user_error(str(path), "line 2"):
        load_study(str(path))
    path.write_text("")
    with user_error(str(path), "output, base, seeds, runs are required"):
        load_study(str(path))
