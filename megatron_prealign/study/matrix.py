"""The jobs of a study: one ordinary recipe per run and seed, checked to be comparable. Imports no torch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prealign.checkpoint.commit import RECIPE_FILE
from megatron_prealign.checkpoint.resume.changes import differences
from megatron_prealign.dictionary.table import DictionaryTable, load_table
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.recipe import DictionarySection, Recipe, RecipeValueError, recipe_to_dict
from megatron_prealign.recipe.load import load_recipe, save_recipe
from megatron_prealign.study.definition import Study, StudyRun

# Prefixes of the fields that must agree for losses to compare.
_COMPARED = (
    "data.",
    "model.",
    "dictionary.held_out_fraction",
    "training.train_tokens",
    "training.train_iters",
    "training.global_batch_size",
    "training.eval_samples",
    "training.retrieval_words",
    "training.retrieval_sentences",
)
# Differ by definition.
_PAIR_MAY_DIFFER = ("dictionary.table", "dictionary.evaluation_table", "logging.", "training.seed")
# Prefixes of the fields that change neither what a run trains nor what it measures. Stricter than resuming, which
# allows whatever neither repeats nor skips data: seeds that differ in more than the seed have no common mean.
_MAY_CHANGE = (
    "logging.",
    "checkpoint.save_interval",
    "checkpoint.async_save",
    "checkpoint.timeout_minutes",
    "checkpoint.keep",
    "checkpoint.on_damage",
    "checkpoint.verify",
    "training.exit_after_minutes",
    "training.garbage_collection_interval",
    "parallel.distributed_timeout_minutes",
)


@dataclass(frozen=True)
class Job:
    """A run with one seed."""

    run: str
    seed: int
    recipe: Recipe
    recipe_file: Path
    directory: Path
    """The run directory."""

    @property
    def name(self) -> str:
        return f"{self.run}_seed{self.seed}"


def build_jobs(study: Study) -> list[Job]:
    """Returns the jobs of a study, all runs of the first seed first.

    Raises:
        UserError: A recipe is invalid; runs differ in data, tokenizer or budget; a shuffled dictionary table is not
            named as a control, a control is none, or it differs from its run in more than the table.
    """
    jobs = [_job(study, run, seed) for seed in study.seeds for run in study.runs]
    first = {job.run: job for job in reversed(jobs)}
    _check_comparable(study, [first[run.name] for run in study.runs])
    _check_controls(study, {name: job.recipe for name, job in first.items()})
    return jobs


def word_class_fields(recipe: Recipe) -> dict[str, Any]:
    """Fields that the classes of words of the validation loss depend on: two runs compare by class if all are equal."""
    section, data = recipe.dictionary, recipe.data
    held_out: object = data.validation
    if not data.validation:
        # The last documents of each source are held out.
        held_out = [[source.path for source in data.sources], data.validation_fraction]
    return {
        "dictionary": section and [section.measured_table, section.held_out_fraction],
        "text": [data.tokenizer, data.seq_length, recipe.training.eval_samples, held_out],
    }


def write_recipes(jobs: Sequence[Job]) -> None:
    """Writes the recipe of each job, which `pretrain --config FILE` trains alone. Checks all of them first.

    Raises:
        UserError: A field that changes the results has changed since its run started.
    """
    for job in jobs:
        # Without the recipe of the study, that of the run itself, which is equal.
        started = next((file for file in (job.recipe_file, job.directory / RECIPE_FILE) if file.exists()), None)
        if started is not None and job.directory.is_dir() and any(job.directory.iterdir()):
            _check_unchanged(job, started)
    for job in jobs:
        job.recipe_file.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(job.recipe_file) as path:
            save_recipe(job.recipe, path)


def _check_unchanged(job: Job, started: Path) -> None:
    changed = differences(recipe_to_dict(load_recipe(["--config", str(started)])), recipe_to_dict(job.recipe))
    shown = [f"{name} {before} -> {now}" for name, (before, now) in changed.items() if not name.startswith(_MAY_CHANGE)]
    if shown:
        raise UserError(
            f"{started}: the recipe of {job.name} has changed since its run started ({', '.join(shown)}); "
            f"restore it, remove {job.directory} to train the run again, or set another output in the study"
        )


def _job(study: Study, run: StudyRun, seed: int) -> Job:
    output = Path(study.output)
    name = f"{run.name}_seed{seed}"
    directory = output / "runs" / name
    # In one word each: a value may start with a minus sign.
    arguments = [f"--config={file}" for file in [*study.base, *run.recipes]]
    for field, value in run.set.items():
        arguments.append(f"--{field}={value if isinstance(value, str) else json.dumps(value)}")
    arguments += [f"--training.seed={seed}", f"--logging.run_dir={directory}"]
    try:
        recipe = load_recipe(arguments)
        recipe.check_world_size(1)
    except UserError as error:
        raise UserError(f"run {run.name}: {error}") from error
    except RecipeValueError as error:
        raise UserError(f"run {run.name}: {error}; a study trains each run in one process") from error
    if recipe.checkpoint.directory is not None:
        raise UserError(
            f"run {run.name}: checkpoint.directory is {recipe.checkpoint.directory}, expected null: runs that "
            "share a directory would resume each other"
        )
    return Job(run.name, seed, recipe, output / "recipes" / f"{name}.yaml", directory)


def _check_comparable(study: Study, jobs: Sequence[Job]) -> None:
    values = {job.run: dict(_flat(asdict(job.recipe))) for job in jobs}
    for name, baseline in study.baselines.items():
        for field in sorted(values[baseline].keys() | values[name].keys()):
            allowed = any(field == each or field.startswith(f"{each}.") for each in study.vary)
            if allowed or not field.startswith(_COMPARED):
                continue
            if field.startswith("dictionary.") and not (field in values[baseline] and field in values[name]):
                # A run without a dictionary holds no words out.
                continue
            expected, got = values[baseline].get(field), values[name].get(field)
            if got != expected:
                raise UserError(
                    f"run {name}: {field} is {json.dumps(got)}, expected {json.dumps(expected)} as in "
                    f"{baseline}, so that the runs compare; add {field} to vary if the study is about it"
                )


def _check_controls(study: Study, recipes: dict[str, Recipe]) -> None:
    controls = {run.control for run in study.runs}
    # Many runs share few tables.
    tables = {
        recipe.dictionary.table for recipe in recipes.values() if recipe.dictionary is not None and _trains(recipe)
    }
    of_table = {table: load_table(table) for table in sorted(tables)}
    shuffled = {
        name: recipe.dictionary is not None and _trains(recipe) and of_table[recipe.dictionary.table].is_control
        for name, recipe in recipes.items()
    }
    for run in study.runs:
        if shuffled[run.name] and run.name not in controls:
            raise UserError(
                f"run {run.name} trains with a shuffled dictionary, but no run names it as its control; set control: "
                f"{run.name} in the run with the true pairs, or use the original table"
            )
        if run.control is None:
            continue
        if not shuffled[run.control]:
            raise UserError(
                f"run {run.name}: control {run.control} does not train with a shuffled dictionary; make its table with "
                "megatron-prealign dictionary shuffle"
            )
        pair, control = (dict(_flat(asdict(recipes[name]))) for name in (run.name, run.control))
        for field in sorted(pair.keys() | control.keys()):
            if pair.get(field) != control.get(field) and not field.startswith(_PAIR_MAY_DIFFER):
                raise UserError(
                    f"run {run.control}: {field} is {json.dumps(control.get(field))}, expected "
                    f"{json.dumps(pair.get(field))} as in {run.name}, whose control it is"
                )
        original, section = recipes[run.name].dictionary, recipes[run.control].dictionary
        if original is not None and section is not None:
            _check_control_table(run, section, original.table, of_table)


def _check_control_table(
    run: StudyRun, section: DictionarySection, original: str, tables: Mapping[str, DictionaryTable]
) -> None:
    """
    Args:
        section: Of the control of `run`.
        original: Table of `run`.
    """
    if section.evaluation_table != original:
        raise UserError(
            f"run {run.control}: dictionary.evaluation_table is {section.evaluation_table or 'null'}, expected "
            f"{original}, the table of {run.name}, so that both measure the same pairs"
        )
    fraction = section.held_out_fraction
    record = tables[section.table].shuffled
    assert record is not None
    again = (
        f"make it again with megatron-prealign dictionary shuffle --table {original} --held-out-fraction {fraction:g} "
        f"--output {section.table}"
    )
    if record["original"] != tables[original].switching_fingerprint():
        raise UserError(
            f"run {run.control}: dictionary.table {section.table} was shuffled from another table than {original} of "
            f"{run.name}; {again}"
        )
    made_for = record.get("held_out_fraction", 0)
    # Otherwise the control trains translations of held-out words.
    if fraction and made_for != fraction:
        raise UserError(
            f"run {run.control}: dictionary.table {section.table} was shuffled for a held_out_fraction of "
            f"{made_for:g}, expected {fraction:g}, that of the run; {again}"
        )


def _trains(recipe: Recipe) -> bool:
    """Whether the run trains with the words of a dictionary; others only measure them."""
    return recipe.alignment is not None or recipe.code_switch is not None


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field."""
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, value
