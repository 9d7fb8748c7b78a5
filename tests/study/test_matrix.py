"""Jobs of a study: ordinary recipes, refused where their results would not compare."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.messages import assert_refused, user_error
from support.tiny import Tiny

from megatron_prealign.cli import main
from megatron_prealign.dictionary.table import load_table
from megatron_prealign.recipe import load_recipe
from megatron_prealign.study.definition import Study, StudyRun
from megatron_prealign.study.matrix import build_jobs, word_class_fields, write_recipes


@pytest.fixture(scope="module")
def control(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("control") / "shuffled.safetensors"
    assert main(["dictionary", "shuffle", "--table", tiny.table, "--output", str(path)]) == 0
    return str(path)


def study_of(tiny: Tiny, directory: Path, runs: list[StudyRun], **fields: Any) -> Study:
    base = directory / "base.yaml"
    base.write_text(yaml.safe_dump(tiny.values(directory / "unused")), encoding="utf-8")
    return Study(output=str(directory / "study"), base=[str(base)], seeds=[1, 2], runs=runs, **fields)


def shuffled(tiny: Tiny, control: str, **fields: Any) -> StudyRun:
    return StudyRun(
        name="shuffled", set={"dictionary.table": control, "dictionary.evaluation_table": tiny.table, **fields}
    )


def test_a_recipe_per_run_and_seed_that_trains_alone(tiny: Tiny, tmp_path: Path) -> None:
    runs = [StudyRun(name="joint", set={"alignment": None, "code_switch": None}), StudyRun(name="aligned")]
    jobs = build_jobs(study_of(tiny, tmp_path, runs))
    assert [(job.run, job.seed, job.name) for job in jobs] == [
        ("joint", 1, "joint_seed1"),
        ("aligned", 1, "aligned_seed1"),
        ("joint", 2, "joint_seed2"),
        ("aligned", 2, "aligned_seed2"),
    ]
    write_recipes(jobs)
    for job in jobs:
        recipe = load_recipe(["--config", str(job.recipe_file)])
        assert recipe == job.recipe
        assert (recipe.training.seed, recipe.logging.run_dir) == (job.seed, str(job.directory))
        assert (recipe.alignment is None) == (job.run == "joint")


def test_a_recipe_that_changes_under_its_run(tiny: Tiny, tmp_path: Path) -> None:
    jobs = build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a")]))
    write_recipes(jobs)
    changed = build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a", set={"optimizer.lr": 5e-4})]))
    # Not started: the new recipe replaces the old one.
    write_recipes(changed)
    changed[1].directory.mkdir(parents=True)
    (changed[1].directory / "metrics.jsonl").touch()
    write_recipes(changed)
    changes = "optimizer.lr 0.0005 -> 0.001"
    with user_error(str(jobs[1].recipe_file), "a_seed2 has changed", changes, str(jobs[1].directory)):
        write_recipes(jobs)
    # Not even that of the first run, which has not started.
    assert [load_recipe(["--config", str(job.recipe_file)]).optimizer.lr for job in jobs] == [5e-4] * 2
    # Without the recipes of the study, the run has its own.
    own = changed[1].directory / "recipe.yaml"
    changed[1].recipe_file.rename(own)
    with user_error(str(own), "a_seed2 has changed", changes, str(jobs[1].directory)):
        write_recipes(jobs)


def test_fields_that_change_no_result_may_change_under_a_run(tiny: Tiny, tmp_path: Path) -> None:
    jobs = build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a")]))
    write_recipes(jobs)
    for job in jobs:
        job.directory.mkdir(parents=True)
        (job.directory / "metrics.jsonl").touch()
    free: dict[str, Any] = {
        "logging.log_interval": 7,
        "logging.tensorboard": False,
        "checkpoint.keep": 5,
        "checkpoint.save_interval": 3,
        "training.exit_after_minutes": 9.0,
    }
    write_recipes(build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a", set=free)])))
    written = load_recipe(["--config", str(jobs[0].recipe_file)])
    assert (written.logging.log_interval, written.checkpoint.keep) == (7, 5)
    # What a run may resume with is not always what it may be compared with.
    with user_error("training.eval_interval", "a_seed1") as caught:
        write_recipes(
            build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a", set={**free, "training.eval_interval": 1})]))
        )
    assert "logging" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "vary"),
    [
        ("training.train_iters", 7, "training.train_iters"),
        ("data.seq_length", 16, "data"),
        ("model.num_layers", 2, "model.num_layers"),
        ("training.eval_samples", 3, "training"),
    ],
)
def test_runs_that_do_not_compare(tiny: Tiny, tmp_path: Path, field: str, value: Any, vary: str) -> None:
    runs = [StudyRun(name="joint"), StudyRun(name="other", set={field: value})]
    with user_error("run other", f"{field} is {value}", "as in joint", f"add {field} to vary"):
        build_jobs(study_of(tiny, tmp_path, runs))
    assert len(build_jobs(study_of(tiny, tmp_path, runs, vary=[vary]))) == 4


def test_a_control_with_its_pair(tiny: Tiny, tmp_path: Path, control: str) -> None:
    runs = [StudyRun(name="true", control="shuffled"), shuffled(tiny, control)]
    assert len(build_jobs(study_of(tiny, tmp_path, runs))) == 4


def test_controls_that_control_nothing(tiny: Tiny, tmp_path: Path, control: str) -> None:
    with user_error("run shuffled", "no run names it as its control", "control: shuffled"):
        build_jobs(study_of(tiny, tmp_path, [StudyRun(name="true"), shuffled(tiny, control)]))
    with user_error("run true", "control other does not train with a shuffled dictionary", "dictionary shuffle"):
        build_jobs(study_of(tiny, tmp_path, [StudyRun(name="true", control="other"), StudyRun(name="other")]))
    # Without alignment and code-switching, the table is only measured.
    joint = shuffled(tiny, control, alignment=None, code_switch=None)
    with user_error("run true", "does not train with a shuffled dictionary"):
        build_jobs(study_of(tiny, tmp_path, [StudyRun(name="true", control="shuffled"), joint]))
    runs = [StudyRun(name="true", control="shuffled"), shuffled(tiny, control, **{"optimizer.lr": 5e-4})]
    with user_error("run shuffled", "optimizer.lr is 0.0005", "expected 0.001 as in true"):
        build_jobs(study_of(tiny, tmp_path, runs))
    runs[1] = StudyRun(name="shuffled", set={"dictionary.table": control})
    with user_error("run shuffled", "dictionary.evaluation_table is null", tiny.table):
        build_jobs(study_of(tiny, tmp_path, runs))


def test_a_control_of_another_table(tiny: Tiny, tmp_path: Path, control: str) -> None:
    rebuilt = str(tmp_path / "table.safetensors")
    table = load_table(tiny.table)
    table.with_keys(np.arange(table.num_keys - 1)).save(rebuilt)
    runs = [
        StudyRun(name="true", set={"dictionary.table": rebuilt}, control="shuffled"),
        shuffled(tiny, control, **{"dictionary.evaluation_table": rebuilt}),
    ]
    with user_error("run shuffled", control, "another table", f"--table {rebuilt} ", f"--output {control}"):
        build_jobs(study_of(tiny, tmp_path, runs))


def test_a_control_for_other_held_out_words(tiny: Tiny, tmp_path: Path, control: str) -> None:
    """The default of the command and of recipes is 0.05."""
    fraction = {"dictionary.held_out_fraction": 0.1}
    runs = [StudyRun(name="true", set=fraction, control="shuffled"), shuffled(tiny, control, **fraction)]
    with user_error("run shuffled", control, "of 0.05, expected 0.1", "--held-out-fraction 0.1"):
        build_jobs(study_of(tiny, tmp_path, runs))
    fraction["dictionary.held_out_fraction"] = 0
    runs = [StudyRun(name="true", set=fraction, control="shuffled"), shuffled(tiny, control, **fraction)]
    assert len(build_jobs(study_of(tiny, tmp_path, runs))) == 4


def test_an_error_in_a_recipe_names_the_run(tiny: Tiny, tmp_path: Path) -> None:
    with user_error("run a: ", "optimizer.lrr"):
        build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a", set={"optimizer.lrr": 1.0})]))


def test_runs_with_and_without_a_dictionary_compare(tiny: Tiny, tmp_path: Path) -> None:
    joint = StudyRun(name="joint", set={"alignment": None, "code_switch": None, "dictionary": None})
    assert len(build_jobs(study_of(tiny, tmp_path, [joint, StudyRun(name="aligned")]))) == 4
    runs = [StudyRun(name="aligned"), StudyRun(name="other", set={"dictionary.held_out_fraction": 0.25})]
    with user_error("run other", "dictionary.held_out_fraction is 0.25", "as in aligned"):
        build_jobs(study_of(tiny, tmp_path, runs))


def test_inputs_that_do_not_exist_start_no_run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = StudyRun(name="b", set={"data.tokenizer": "no/tokenizer", "dictionary.evaluation_table": "no/table"})
    study = study_of(tiny, tmp_path, [StudyRun(name="a"), missing], vary=["data"])
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(asdict(study)), encoding="utf-8")
    status = main(["study", "--config", str(path)])
    assert_refused(status, capsys.readouterr().err, "no/tokenizer", "no/table")
    assert not (tmp_path / "study").exists()


def test_runs_that_would_share_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tmp_path / "checkpoints.yaml"
    recipe.write_text("checkpoint: {directory: shared}\n")
    with user_error("run a: checkpoint.directory is shared", "expected null"):
        build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a", recipes=[str(recipe)])]))


def test_runs_of_several_processes(tiny: Tiny, tmp_path: Path) -> None:
    runs = [StudyRun(name="a", set={"parallel.pipeline_model_parallel_size": 2})]
    with user_error("run a: ", "pipeline_model_parallel_size", "in one process"):
        build_jobs(study_of(tiny, tmp_path, runs))


def test_values_that_look_like_options(tiny: Tiny, tmp_path: Path) -> None:
    """A negative number with an exponent is an option to argparse, and a path may start with a minus sign."""
    with user_error("run a: ", "optimizer.lr is -1e-05"):
        build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a", set={"optimizer.lr": -1e-05})]))
    (job, _) = build_jobs(study_of(tiny, tmp_path, [StudyRun(name="a", set={"data.cache": "-cache"})]))
    assert job.recipe.data.cache == "-cache"


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("dictionary.held_out_fraction", 0.5, False),
        ("training.eval_samples", 3, False),
        ("data.seq_length", 16, False),
        # The last documents of the sources are held out.
        ("data.validation_fraction", 0.2, False),
        ("optimizer.lr", 5e-4, True),
    ],
)
def test_what_the_classes_of_words_depend_on(
    tiny: Tiny, tmp_path: Path, control: str, field: str, value: Any, same: bool
) -> None:
    runs = [StudyRun(name="true", control="shuffled"), shuffled(tiny, control)]
    runs.append(StudyRun(name="other", set={field: value}))
    jobs = build_jobs(study_of(tiny, tmp_path, runs, vary=[field]))
    true, control_of_true, other = (word_class_fields(job.recipe) for job in jobs[:3])
    assert true == control_of_true
    assert (other == true) == same
