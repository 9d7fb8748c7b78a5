"""Definition of a study: a YAML file that names recipes, runs and seeds. Imports no torch."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_type_hints

from megatron_prealign.errors import UserError
from megatron_prealign.files.yaml_text import YamlError, load_yaml, read_utf8
from megatron_prealign.recipe.checks import RecipeValueError
from megatron_prealign.recipe.document import check_document, field_type

LEAST_SEEDS = 2
"""Fewest seeds that have a standard deviation."""
LONGEST_RUN_NAME = 100
LONGEST_SWEEP_NAME = 60
# File systems have names of at most 255 bytes, and the temporary name of a plot is longer than its name.
_LONGEST_SWEEP_BYTES = 180
_SET_BY_STUDY = ("training.seed", "logging.run_dir", "checkpoint.directory")

Value = int | float | bool | str | list[int] | None


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """A run of the study, trained once per seed."""

    name: str
    """Name in tables and paths."""
    recipes: list[str] = field(default_factory=list)
    """Recipes on top of those in `base`, in order."""
    set: dict[str, Value] = field(default_factory=dict)
    """Fields of the recipe, by dotted name, on top of all recipes; null removes a section."""
    control: str | None = None
    """Name of the run with a shuffled dictionary that this one is compared with."""
    against: str | None = None
    """Name of the run that differences are taken from; null means the first. For runs on other data, or of another
    size, than the first."""
    at: dict[str, float] = field(default_factory=dict)
    """Points of this run in sweeps: name of the sweep -> value on its axis. The runs of a sweep make one curve."""


@dataclass(frozen=True, kw_only=True)
class QuickStudy:
    """What `--quick` changes."""

    seeds: list[int] = field(default_factory=list)
    """Seeds instead of those of the study."""
    runs: list[str] = field(default_factory=list)
    """Names of the runs to keep; empty keeps all. A control that is left out is not compared with."""
    set: dict[str, Value] = field(default_factory=dict)
    """Fields of all recipes, by dotted name."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A matrix of runs and seeds."""

    output: str
    """Directory of recipes, runs, tables and plots."""
    base: list[str]
    """Recipes that all runs have in common."""
    seeds: list[int]
    """Values of training.seed, at least two."""
    runs: list[StudyRun]
    """Runs; the others are compared with the first, or with the one that they name."""
    vary: list[str] = field(default_factory=list)
    """Dotted names of fields of data, tokenizer, dictionary or token budget in which runs may differ, for studies of
    just these fields. Runs that differ in others are refused."""
    processes: int | None = None
    """Runs that train at once, in one process of one thread each; null means one per GPU, or per core without
    GPUs."""
    quick: QuickStudy = field(default_factory=QuickStudy)
    """What --quick changes; its results go to a directory of their own, OUTPUT-quick."""

    @property
    def baselines(self) -> dict[str, str]:
        """Name of each run but the first -> name of the run that its differences are taken from."""
        return {run.name: run.against or self.runs[0].name for run in self.runs[1:]}

    @property
    def sweeps(self) -> dict[str, list[StudyRun]]:
        """Name of each sweep -> its runs in the order of their values."""
        names = dict.fromkeys(name for run in self.runs for name in run.at)
        return {
            name: sorted((run for run in self.runs if name in run.at), key=lambda run: run.at[name]) for name in names
        }


def load_study(path: str, *, quick: bool = False) -> Study:
    """Reads and checks a study.

    Args:
        quick: Apply the section `quick`.

    Raises:
        UserError: The file is missing, or a field is unknown, missing, of another type or inconsistent.
    """
    try:
        text = read_utf8(Path(path))
        check_document(text, Study)
        values = load_yaml(text)
    except (YamlError, RecipeValueError) as error:
        raise UserError(f"study {path}: {error}") from error
    try:
        study = _from_values(values or {})
        _check(study)
    except RecipeValueError as error:
        raise UserError(f"study {path}: {error}") from error
    return _made_quick(study) if quick else study


def _from_values(values: dict[str, Any]) -> Study:
    required = ("output", "base", "seeds", "runs")
    missing = [name for name in required if values.get(name) is None]
    if missing:
        raise RecipeValueError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} required but not set")
    sections = {"quick": QuickStudy(**_given(values.get("quick") or {}, QuickStudy, "quick."))}
    runs = [StudyRun(**_given(run, StudyRun, f"runs[{number}].")) for number, run in enumerate(values["runs"])]
    return Study(**{**_given(values, Study), **sections, "runs": runs})


def _given(values: dict[str, Any], kind: type, prefix: str = "") -> dict[str, Any]:
    """Values that are set; null means the default."""
    hints = get_type_hints(kind)
    given = {name: value for name, value in values.items() if name in hints and value is not None}
    for name, value in given.items():
        if isinstance(value, list) and None in value:
            raise RecipeValueError(f"{prefix}{name} has null, expected values only")
        # A quoted number is a number, as in a recipe.
        if hints[name] == list[int]:
            given[name] = [int(each) for each in value]
        elif hints[name] == int | None:
            given[name] = int(value)
        elif hints[name] == dict[str, float]:
            empty = [key for key, each in value.items() if each is None]
            if empty:
                raise RecipeValueError(f"{prefix}{name}.{empty[0]} is null, expected a number")
            given[name] = {key: float(each) for key, each in value.items()}
    return given


def sweep_file(name: str) -> str:
    """Stem of the file of a sweep's plot: its name in lower case, with hyphens for all but letters and digits."""
    return "sweep-" + re.sub(r"[\W_]+", "-", name.lower()).strip("-")


def _made_quick(study: Study) -> Study:
    quick = study.quick
    kept = [run for run in study.runs if not quick.runs or run.name in quick.runs]
    names = [run.name for run in kept]
    # A sweep with a single run left has no curve.
    sweeps = {sweep for sweep in study.sweeps if sum(sweep in run.at for run in kept) > 1}
    return replace(
        study,
        output=f"{study.output.rstrip('/')}-quick",
        seeds=quick.seeds or study.seeds,
        runs=[
            replace(
                run,
                set={**run.set, **quick.set},
                control=run.control if run.control in names else None,
                against=run.against if run.against in names else None,
                at={sweep: value for sweep, value in run.at.items() if sweep in sweeps},
            )
            for run in kept
        ],
    )


def _check(study: Study) -> None:
    if not Path(study.output).name:
        raise RecipeValueError(f"output is {study.output or 'empty'}, expected the path of a directory of its own")
    if study.processes is not None and study.processes < 1:
        raise RecipeValueError(f"processes is {study.processes}, expected null or a positive number")
    _check_seeds("seeds", study.seeds)
    if study.quick.seeds:
        _check_seeds("quick.seeds", study.quick.seeds)
    for name in study.vary:
        if field_type(name) is None:
            raise RecipeValueError(f"vary has {name}, expected names of fields or sections of a recipe")
    _check_runs(study)
    _check_sweeps(study)
    _check_set("quick.set", study.quick.set)


def _check_seeds(name: str, seeds: list[int]) -> None:
    _check_distinct(name, [str(seed) for seed in seeds])
    if len(seeds) < LEAST_SEEDS:
        raise RecipeValueError(
            f"{name} has {len(seeds)}, expected at least {LEAST_SEEDS}, since tables have a standard deviation"
        )


def _check_runs(study: Study) -> None:
    names = [run.name for run in study.runs]
    if not names:
        raise RecipeValueError("runs is empty, expected at least one run")
    _check_distinct("runs", names)
    unknown = [name for name in study.quick.runs if name not in names]
    if unknown:
        raise RecipeValueError(f"quick.runs has {', '.join(unknown)}, expected names of runs")
    for number, run in enumerate(study.runs):
        if not re.fullmatch(rf"[A-Za-z0-9_-]{{1,{LONGEST_RUN_NAME}}}", run.name):
            raise RecipeValueError(
                f"runs[{number}].name is {run.name[: LONGEST_RUN_NAME + 1] or 'empty'}, expected 1 to "
                f"{LONGEST_RUN_NAME} letters, digits, - and _"
            )
        if run.control is not None and (run.control not in names or run.control == run.name):
            raise RecipeValueError(f"runs[{number}].control is {run.control}, expected the name of another run")
        if run.against is not None and (run.against not in names or run.against == run.name or number == 0):
            expected = "null, because it is the first run" if number == 0 else "the name of another run"
            raise RecipeValueError(f"runs[{number}].against is {run.against}, expected {expected}")
        _check_set(f"runs[{number}].set", run.set)


def _check_sweeps(study: Study) -> None:
    files: dict[str, str] = {}
    for name, runs in study.sweeps.items():
        too_long = len(name) > LONGEST_SWEEP_NAME or len(name.encode()) > _LONGEST_SWEEP_BYTES
        if sweep_file(name) == "sweep-" or too_long or not name.isprintable():
            raise RecipeValueError(
                f"run {runs[0].name}: at has the sweep {name[:LONGEST_SWEEP_NAME]!r}, expected a name of at most "
                f"{LONGEST_SWEEP_NAME} characters ({_LONGEST_SWEEP_BYTES} bytes) with a letter or digit"
            )
        for run, following in zip(runs, runs[1:], strict=False):
            if run.at[name] == following.at[name]:
                raise RecipeValueError(
                    f"runs {run.name} and {following.name} are both at {number(run.at[name])} in the sweep {name}, "
                    "expected different values"
                )
        if len(runs) < 2:
            raise RecipeValueError(
                f"run {runs[0].name} is the only one at the sweep {name}, expected at least two runs at different "
                "values"
            )
        other = files.setdefault(sweep_file(name), name)
        if other != name:
            raise RecipeValueError(
                f"the sweeps {other} and {name} would share the plot {sweep_file(name)}.png; rename one of them"
            )


def number(value: float) -> str:
    """Text of a value on the axis of a sweep."""
    return f"{value:.10g}"


def _check_distinct(name: str, values: list[str]) -> None:
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise RecipeValueError(f"{name} has {', '.join(repeated)} more than once, expected each once")


def _check_set(name: str, values: dict[str, Value]) -> None:
    for field_name in values:
        if field_name in _SET_BY_STUDY:
            raise RecipeValueError(f"{name} has {field_name}, which the study sets for each seed")
        # Options of the command, such as --help, are no fields. A wrong name in a section is found with the recipe.
        section = field_name.partition(".")[0]
        if field_type(section) is None:
            raise RecipeValueError(f"{name} has {field_name}, expected dotted names of fields of a recipe")
