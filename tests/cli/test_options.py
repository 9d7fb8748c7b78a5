"""Options out of dataclasses: how they are read, what their help says, and what a wrong one is answered with."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from megatron_prealign import cli
from megatron_prealign.cli.options import parse_options
from megatron_prealign.cli.recipe_options import parse_recipe_arguments
from megatron_prealign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Copies one thing to another."""

    input: list[Annotated[str, "PATH"]]
    """Files to read."""
    output: Annotated[str, "PATH"]
    """Where to write."""
    text_key: str = "text"
    """Key of the text."""
    workers: int | None = None
    """Number of processes."""
    ratio: float = 0.05
    """Share of all."""
    mode: Literal["fast", "slow"] = "fast"
    """How to do it."""
    weights: dict[str, float] | None = None
    """Weight by name."""
    names: list[str] = field(default_factory=lambda: ["a", "b"])
    """Several names."""
    force: bool = False
    """Do it anyway."""
    check: bool = True
    """Check nothing."""


def parse(*arguments: str) -> Options:
    return parse_options(Options, "copy", ["--input", "x", "--output", "y", *arguments])


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], {"input": ["x"], "output": "y", "names": ["a", "b"], "force": False, "check": True}),
        (["--text-key", "a-b", "--text_key=c_d"], {"text_key": "c_d"}),
        (["--text-key", "--x-y"[2:]], {"text_key": "x-y"}),
        (["--input", "p", "q", "--workers", "3", "--input=r"], {"input": ["x", "p", "q", "r"], "workers": 3}),
        (["--ratio", "1e-3", "--mode", "slow"], {"ratio": 0.001, "mode": "slow"}),
        (["--weights", "de=2", "fr=0.5"], {"weights": {"de": 2.0, "fr": 0.5}}),
        (["--names"], {"names": []}),
        (["--force", "--no-check"], {"force": True, "check": False}),
        (["--no-check", "--check"], {"check": True}),
    ],
)
def test_values_are_read(arguments: list[str], values: dict[str, Any]) -> None:
    parsed = parse(*arguments)
    assert {name: getattr(parsed, name) for name in values} == values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workres", "3"], "unknown option --workres; did you mean --workers?"),
        (["--zzz"], "unknown option --zzz; see megatron-prealign copy --help"),
        # No abbreviations: a later option could take the same beginning.
        (["--work", "3"], "unknown option --work; did you mean --workers?"),
        (["--output", "y", "z"], "unexpected argument 'z'; see megatron-prealign copy --help"),
        (["--workers", "3.5"], "--workers is 3.5, expected a whole number"),
        (["--ratio", "much"], "--ratio is much, expected a number"),
        (["--ratio", "inf"], "--ratio is inf, expected a finite number"),
        (["--mode", "fats"], "--mode is fats, expected one of fast, slow; did you mean fast?"),
        (["--weights", "de"], "--weights is de, expected NAME=NUMBER"),
        (["--weights", "de=x"], "--weights is x, expected a number"),
        (["--text-key"], "--text-key needs a value; see megatron-prealign copy --help"),
    ],
)
def test_what_is_wrong_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*arguments)
    assert str(caught.value) == message


def test_all_missing_options_are_named_at_once_and_a_typo_before_them() -> None:
    with pytest.raises(UserError, match="^--input and --output are required; see megatron-prealign copy --help$"):
        parse_options(Options, "copy", [])
    with pytest.raises(UserError, match="^--output is required"):
        parse_options(Options, "copy", ["--input", "x"])
    with pytest.raises(UserError, match="did you mean --input"):
        parse_options(Options, "copy", ["--inptu", "x"])


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Shows things."""

    path: list[Annotated[str, "PATH"]]
    """What to show."""
    json: bool = False
    """As JSON."""


@pytest.mark.parametrize(
    "arguments",
    [["a", "b", "--json"], ["--json", "a", "b"], ["--path", "a", "b", "--json"], ["--path=a", "--json", "--path=b"]],
)
def test_one_field_may_go_without_its_name(arguments: list[str]) -> None:
    assert parse_options(Shown, "show", arguments, positional="path") == Shown(path=["a", "b"], json=True)
    with pytest.raises(UserError, match="^PATH is required"):
        parse_options(Shown, "show", ["--json"], positional="path")


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_what_a_person_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_options(Options, "copy", ["--input", "x", "--help"])
    assert capsys.readouterr().out == (
        "usage: megatron-prealign copy --input PATH... --output PATH [options]\n\n"
        "Copies one thing to another.\n\n"
        "required:\n"
        "  --input PATH...           Files to read.\n"
        "  --output PATH             Where to write.\n\n"
        "options:\n"
        "  --text-key TEXT           Key of the text. (default: text)\n"
        "  --workers INT             Number of processes.\n"
        "  --ratio NUMBER            Share of all. (default: 0.05)\n"
        "  --mode {fast,slow}        How to do it. (default: fast)\n"
        "  --weights NAME=NUMBER...  Weight by name.\n"
        "  --names TEXT...           Several names. (default: a b)\n"
        "  --force                   Do it anyway.\n"
        "  --no-check                Check nothing.\n"
    )


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ([], ["--validate", "--config FILE", "alignment_guard"]),
        (["alignment"], ["--alignment.temperature NUMBER", "Temperature tau of the contrastive loss."]),
        (["code_switch"], ["--code-switch.ratio NUMBER"]),
        (["all"], ["--model.num-layers INT", "--alignment.train-iters INT", "--checkpoint.keep-best"]),
    ],
)
def test_help_of_a_recipe_by_section(topic: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("pretrain", "--help", *topic, capsys=capsys)
    for each in expected:
        assert each in text
    assert "_iters" not in text.replace("lr_warmup_iters", "").replace("train_iters", "") or topic != ["all"]


@dataclass(frozen=True, kw_only=True)
class Own:
    """Trains."""

    validate: bool = False
    """Only check."""


@pytest.mark.parametrize(
    ("given", "rest"),
    [
        (["--config", "a.yaml", "--optimizer.lr", "-3"], ["--config", "a.yaml", "--optimizer.lr", "-3"]),
        (["--training.train-iters=5"], ["--training.train_iters=5"]),
        # A bare field that is true or false.
        (["--parallel.sequence-parallel", "--validate"], ["--parallel.sequence_parallel=true"]),
        (["--parallel.sequence_parallel", "false"], ["--parallel.sequence_parallel", "false"]),
        (["--code-switch.language-weights.de", "2"], ["--code_switch.language_weights.de", "2"]),
        (["--alignment", "null"], ["--alignment", "null"]),
        (["--print-config", "--config", "a"], ["--print_config", "--config", "a"]),
    ],
)
def test_fields_of_a_recipe_are_options(given: list[str], rest: list[str]) -> None:
    _, left = parse_recipe_arguments("pretrain", Own, given)
    assert left == rest


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--training.train_itres", "5"],
            "unknown option --training.train-itres; did you mean --training.train-iters?",
        ),
        (["--trainig.seed", "5"], "unknown option --trainig.seed; did you mean --training.seed?"),
        (["--valdiate"], "unknown option --valdiate; did you mean --validate?"),
        (["--confg", "a.yaml"], "unknown option --confg; did you mean --config?"),
        (["recipe.yaml"], "unexpected argument 'recipe.yaml'; did you mean --config recipe.yaml?"),
        (["--training.seed", "1", "2"], "unexpected argument '2'"),
        (["--training.seed.more", "1"], "unknown option --training.seed.more"),
    ],
)
def test_a_typo_in_an_option_of_a_recipe_is_answered_with_the_nearest(given: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_recipe_arguments("pretrain", Own, given)
    assert str(caught.value).startswith(message)
