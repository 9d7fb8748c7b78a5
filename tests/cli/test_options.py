"""Options from dataclasses: parsing, help texts and errors."""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from support.messages import assert_refused, user_error

from megatron_prealign import cli
from megatron_prealign.cli.options import parse_options
from megatron_prealign.cli.recipe_options import parse_recipe_arguments
from megatron_prealign.recipe import load_recipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """Copies files."""

    input: list[Annotated[str, "PATH"]]
    """Files to read."""
    output: Annotated[str, "PATH"]
    """Output directory."""
    text_key: str = "text"
    """Key of the text."""
    workers: int | None = None
    """Number of processes."""
    ratio: float = 0.05
    """Fraction to copy."""
    mode: Literal["fast", "slow"] = "fast"
    """Copy mode."""
    weights: dict[str, float] | None = None
    """Weight by name."""
    names: list[str] = field(default_factory=lambda: ["a", "b"])
    """Several names."""
    force: bool = False
    """Overwrite existing output."""
    check: bool = True
    """Verify the copy."""


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
def test_values_are_parsed(arguments: list[str], values: dict[str, Any]) -> None:
    parsed = parse(*arguments)
    assert {name: getattr(parsed, name) for name in values} == values


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--workres", "3"], ("unknown option --workres", "--workers?")),
        (["--zzz"], ("unknown option --zzz", "megatron-prealign copy --help")),
        # No abbreviations: a later option could have the same prefix.
        (["--work", "3"], ("unknown option --work;", "--workers?")),
        (["--output", "y", "z"], ("unexpected argument 'z'", "megatron-prealign copy --help")),
        (["--workers", "3.5"], ("--workers is 3.5", "integer")),
        (["--ratio", "much"], ("--ratio is much", "number")),
        (["--ratio", "inf"], ("--ratio is inf", "finite number")),
        (["--weights", "de=nan"], ("--weights is nan", "finite number")),
        (["--ratio", "1e300"], ("--ratio is 1e300", "up to 9,223,372")),
        (["--workers", "9" * 4000], ("--workers is 9999", "up to 9,223,372")),
        (["--mode", "fats"], ("--mode is fats", "one of fast, slow", "did you mean fast?")),
        (["--weights", "de"], ("--weights is de", "NAME=NUMBER")),
        (["--weights", "de=x"], ("--weights is x", "number")),
        (["--output=~/runs"], ("--output is ~/runs", "shell")),
        (["--input", "~user/x"], ("--input is ~user/x", "shell")),
        (["--force=3"], ("--force takes no value", "megatron-prealign copy --help")),
        (["--text-key"], ("--text-key needs a value", "megatron-prealign copy --help")),
    ],
)
def test_error_is_one_line(arguments: list[str], facts: tuple[str, ...]) -> None:
    with user_error(*facts):
        parse(*arguments)


def test_all_missing_options_are_reported_together_and_unknown_ones_first() -> None:
    with user_error("--input and --output", "required", "megatron-prealign copy --help"):
        parse_options(Options, "copy", [])
    with user_error("--output", "required") as caught:
        parse_options(Options, "copy", ["--input", "x"])
    assert "--input" not in str(caught.value)
    with user_error("did you mean --input"):
        parse_options(Options, "copy", ["--inptu", "x"])


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Shows files."""

    path: list[Annotated[str, "PATH"]]
    """Files to show."""
    json: bool = False
    """As JSON."""


@pytest.mark.parametrize(
    "arguments",
    [["a", "b", "--json"], ["--json", "a", "b"], ["--path", "a", "b", "--json"], ["--path=a", "--json", "--path=b"]],
)
def test_one_field_may_be_positional(arguments: list[str]) -> None:
    assert parse_options(ShowOptions, "show", arguments, positional="path") == ShowOptions(path=["a", "b"], json=True)
    with user_error("PATH", "required") as caught:
        parse_options(ShowOptions, "show", ["--json"], positional="path")
    assert "--path" not in str(caught.value)


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_options(Options, "copy", ["--input", "x", "--help"])
    assert capsys.readouterr().out == (
        "usage: megatron-prealign copy --input PATH... --output PATH [options]\n\n"
        "Copies files.\n\n"
        "required:\n"
        "  --input PATH...           Files to read.\n"
        "  --output PATH             Output directory.\n\n"
        "options:\n"
        "  --text-key TEXT           Key of the text. (default: text)\n"
        "  --workers INT             Number of processes.\n"
        "  --ratio NUMBER            Fraction to copy. (default: 0.05)\n"
        "  --mode {fast,slow}        Copy mode. (default: fast)\n"
        "  --weights NAME=NUMBER...  Weight by name.\n"
        "  --names TEXT...           Several names. (default: a b)\n"
        "  --force                   Overwrite existing output.\n"
        "  --check, --no-check       Verify the copy. (default: true)\n"
    )


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ([], ["--validate", "--config FILE", "alignment_guard"]),
        (["alignment"], ["--alignment.temperature NUMBER", "Temperature (tau) of the contrastive loss."]),
        (["code_switch"], ["--code-switch.ratio NUMBER"]),
        (["all"], ["--model.num-layers INT", "--alignment.train-iters INT", "--checkpoint.keep-best"]),
    ],
)
def test_recipe_help_by_section(topic: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("pretrain", "--help", *topic, capsys=capsys)
    for each in expected:
        assert each in text
    assert "_iters" not in text.replace("lr_warmup_iters", "").replace("train_iters", "") or topic != ["all"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Trains a model."""

    validate: bool = False
    """Only check the recipe."""


@pytest.mark.parametrize(
    ("arguments", "recipe_arguments"),
    [
        (["--config", "a.yaml", "--optimizer.lr", "-3"], ["--config", "a.yaml", "--optimizer.lr", "-3"]),
        (["--training.train-iters=5"], ["--training.train_iters=5"]),
        # A boolean field without a value.
        (["--parallel.sequence-parallel", "--validate"], ["--parallel.sequence_parallel=true"]),
        (["--parallel.sequence_parallel", "false"], ["--parallel.sequence_parallel", "false"]),
        (["--code-switch.language-weights.de", "2"], ["--code_switch.language_weights.de", "2"]),
        (["--alignment", "null"], ["--alignment", "null"]),
        (["--print-config", "--config", "a"], ["--print_config", "--config", "a"]),
    ],
)
def test_recipe_fields_are_options(arguments: list[str], recipe_arguments: list[str]) -> None:
    _, rest = parse_recipe_arguments("pretrain", TrainOptions, arguments)
    assert rest == recipe_arguments


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--training.train_itres", "5"], ("unknown option --training.train-itres", "--training.train-iters?")),
        (["--trainig.seed", "5"], ("unknown option --trainig.seed", "--training.seed?")),
        (["--valdiate"], ("unknown option --valdiate", "--validate?")),
        (["--confg", "a.yaml"], ("unknown option --confg", "--config?")),
        (["recipe.yaml"], ("unexpected argument 'recipe.yaml'", "--config recipe.yaml?")),
        (["--training.seed", "1", "2"], ("unexpected argument '2'",)),
        (["--training.seed.more", "1"], ("unknown option --training.seed.more",)),
    ],
)
def test_unknown_recipe_option_is_reported_with_a_suggestion(arguments: list[str], facts: tuple[str, ...]) -> None:
    with user_error(*facts):
        parse_recipe_arguments("pretrain", TrainOptions, arguments)


def test_unknown_section_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(cli.main(["pretrain", "--help", "optimiser"]), capsys.readouterr().err, "optimiser", "optimizer")


@pytest.mark.parametrize("topic", ["code-switch", "code_switch.language_weights", "--code-switch.ratio"])
def test_help_of_a_field_shows_its_section(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("pretrain", "--help", topic, capsys=capsys)
    assert "--code-switch.ratio NUMBER" in text
    assert "--code-switch.language-weights '{NAME: NUMBER}'" in text


def test_values_of_list_fields_are_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("pretrain", "--help", "all", capsys=capsys)
    assert "--code-switch.source-languages '[TEXT, ...]'" in text
    assert "--code-switch.language-weights '{NAME: NUMBER}'" in text
    assert "--alignment.layers 'TEXT | [INT, ...] | {NAME: NUMBER}'" in text
    assert "--model.family {llama," in text
    arguments = ["pretrain", "--code-switch.source-languages", "en", "de"]
    assert_refused(
        cli.main(arguments), capsys.readouterr().err, "'de'", "--code-switch.source-languages", "[TEXT, ...]"
    )


def test_option_of_the_recipe_without_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["pretrain", "--training.train-iters"]
    assert_refused(cli.main(arguments), capsys.readouterr().err, "--training.train-iters needs a value")


def test_the_example_in_the_help_is_a_valid_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = help_of("pretrain", "--help", capsys=capsys).split("recipe.yaml:\n")[-1]
    (tmp_path / "recipe.yaml").write_text(textwrap.dedent(example))
    assert load_recipe(["--config", str(tmp_path / "recipe.yaml")]).training.train_iters == 1000
    assert max(len(line) for line in example.splitlines()) <= 110


@pytest.mark.parametrize("code", ["../../x", "", "de en", "-de", "d/e", "x" * 64])
@pytest.mark.parametrize(
    "command",
    [
        ["preprocess", "--input", "x", "--tokenizer", "t", "--output", "o", "--language"],
        ["train-tokenizer", "--input", "x", "--output", "o", "--vocab-size", "300", "--clone-language"],
        ["dataset", "merge", "--output", "o", "--language"],
        ["dataset", "repair", "x", "--language"],
        ["dictionary", "build", "--input", "x", "--tokenizer", "t", "--output", "o", "--source"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_language_codes_of_every_command(command: list[str], code: str, capsys: pytest.CaptureFixture[str]) -> None:
    *options, name = command
    assert_refused(cli.main([*options, f"{name}={code}"]), capsys.readouterr().err, name, "language code")
