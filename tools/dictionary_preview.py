"""`megatron-prealign dictionary preview`: shows samples of a dataset before and after code-switching."""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.options import errors_of_options, parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import CodeSwitchSection, DataSection, DataSource, DictionarySection, Recipe
from megatron_prealign.recipe.describe import PathText, PrefixText
from megatron_prealign.text import closing, command, plural

if TYPE_CHECKING:
    from megatron_prealign.code_switch.preview import Preview
    from megatron_prealign.dictionary.table import DictionaryTable
    from megatron_prealign.tokenizer.base import Tokenizer

DEFAULT_RATIO = 0.05
DEFAULT_SEQ_LENGTH = 256
DEFAULT_SEED = 1


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """Shows the effect of code-switching on samples drawn evenly from the datasets in languages whose words are
    replaced, original next to result.

    Omitted options default to the recipe's values, or without a recipe to those of a recipe with only `ratio` set.
    """

    config: PathText | None = None
    """Recipe to take the table, the data, the seed and the code_switch section from."""
    table: PathText | None = None
    """Table file; default: the recipe's. Without a recipe, no groups are held out."""
    data: PrefixText | None = None
    """Prefix of a preprocessed dataset; default: the recipe's blend."""
    tokenizer: PathText | None = None
    """Tokenizer of the dataset; default: the recipe's, or the one recorded in the dataset's .json."""
    rows: int = 20
    """Number of samples to show."""
    seq_length: int | None = None
    """Sequence length in tokens; 256 without a recipe."""
    seed: int | None = None
    """Seed of the samples and of all draws; 1 without a recipe."""
    consumed_tokens: int = 0
    """Number of tokens already trained on in the phase, for a ratio with a schedule."""
    ratio: float | None = None
    """Fraction of words to replace, from 0 to 1; 0.05 without a recipe. Disables the schedule of the recipe."""
    ratio_of: Literal["occurrences", "words"] | None = None
    """Base of the ratio: words that the table knows (occurrences), or all running words (words)."""
    label_mode: Literal["input_only", "codeswitch", "no_predict", "mix"] | None = None
    """Effect of replaced words on the labels."""
    language_weights: dict[str, float] | None = None
    """Sampling weights of target languages, such as de=2 fr=1."""
    language_ratios: dict[str, float] | None = None
    """Ratios of individual target languages, such as de=0.1."""
    source_languages: list[str] | None = None
    """Languages whose samples are switched."""
    candidate_weights: Literal["table", "uniform"] | None = None
    """Weights for drawing a translation among those of one language."""
    min_word_length: int | None = None
    """Minimum length of a replaced source word in characters."""
    max_word_length: int | None = None
    """Maximum length of a replaced source word in characters."""
    case: Literal["follow", "keep", "exact"] | None = None
    """How the case of words is matched and applied to translations."""
    lookahead: int | None = None
    """Number of tokens read beyond the end of a sequence to refill it when switching shortens it."""
    labels: bool = False
    """Also show the label of every input token; best with a small --seq-length."""
    html: PathText | None = None
    """HTML page to write the samples to, in addition to the text output."""
    color: Literal["auto", "always", "never"] = "auto"
    """When to use colours; auto uses them on a terminal unless NO_COLOR is set."""


def preview(argv: Sequence[str]) -> int:
    """Runs `dictionary preview`."""
    options = parse_options(PreviewOptions, "dictionary preview", argv)
    _check(options)
    if options.html is not None:
        _check_page(Path(options.html))
    recipe = _recipe(options)
    section = _section(options, recipe)

    from megatron_prealign.code_switch.preview import make_preview
    from megatron_prealign.code_switch.preview_text import TextStyle, render_preview

    data = _data(options, recipe)
    with errors_of_options(_fields_of_options(options)):
        section.check_lookahead(data.seq_length)
    table, tokenizer = _open(options, recipe, data)
    if options.data is not None:
        _check_length(options.data, data.seq_length)
    seed = options.seed if options.seed is not None else (recipe.training.seed if recipe else DEFAULT_SEED)
    result = make_preview(
        table, section, data, tokenizer, num_samples=options.rows, seed=seed, consumed_tokens=options.consumed_tokens
    )
    if options.html is not None:
        _write_page(result, Path(options.html))
    style = TextStyle(color=_wants_color(options.color), width=_terminal_width())
    for line in render_preview(result, style, labels=options.labels):
        print(line)
    samples = f"{plural(len(result.samples), 'sample')} of {plural(result.seq_length, 'token')}"
    if len(result.samples) < options.rows:
        print(f"the data has only {samples}, --rows is {options.rows:,}")
    made = "showed" if options.html is None else f"wrote {options.html}:"
    following = [] if options.config is None else [command("pretrain", "--config", options.config, "--validate")]
    print(closing(f"{made} {samples}", *following))
    return 0


def _check(options: PreviewOptions) -> None:
    if options.config is None and (options.table is None or options.data is None):
        missing = " and ".join(f"--{name}" for name in ("table", "data") if getattr(options, name) is None)
        raise UserError(f"dictionary preview: missing {missing}; set --table and --data, or use --config")
    limits = {"rows": (1, 2**31), "seq_length": (1, 2**20), "seed": (0, 2**64 - 1), "consumed_tokens": (0, 2**63)}
    for name, (minimum, maximum) in limits.items():
        value = getattr(options, name)
        if value is not None and not minimum <= value <= maximum:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected a number from {minimum} to {maximum}")
    if options.ratio is not None and not 0.0 <= options.ratio <= 1.0:
        raise UserError(f"--ratio is {options.ratio}, expected a number from 0 to 1")


def _recipe(options: PreviewOptions) -> Recipe | None:
    if options.config is None:
        return None
    from megatron_prealign.cli.recipe_options import open_recipe

    return open_recipe(["--config", options.config], "dictionary preview")


def _section(options: PreviewOptions, recipe: Recipe | None) -> CodeSwitchSection:
    if recipe is not None and recipe.code_switch is not None:
        values = asdict(recipe.code_switch)
    else:
        values = {"ratio": DEFAULT_RATIO}
    if options.ratio is not None:
        values |= {"schedule": "constant", "final_ratio": None, "schedule_tokens": None}
    names = {field.name for field in fields(CodeSwitchSection)}
    values |= {name: value for name, value in vars(options).items() if name in names and value is not None}
    with errors_of_options(_fields_of_options(options)):
        return CodeSwitchSection(**values)


def _fields_of_options(options: PreviewOptions) -> set[str]:
    """Fields of a recipe that options set: all that have an option, unless the recipe sets them."""
    paths = {f"code_switch.{field.name}" for field in fields(CodeSwitchSection)} | {"data.seq_length"}
    if options.config is None:
        return paths
    return {path for path in paths if getattr(options, path.partition(".")[2], None) is not None}


def _data(options: PreviewOptions, recipe: Recipe | None) -> DataSection:
    """Returns the recipe's blend, or the dataset of --data."""
    length = options.seq_length
    if recipe is not None:
        data = recipe.data if length is None else replace(recipe.data, seq_length=length)
        if options.tokenizer is not None:
            data = replace(data, tokenizer=options.tokenizer)
        if options.data is None:
            return data
        length = data.seq_length
    from megatron_prealign.data.sidecar import load_sidecar, sidecar_path

    assert options.data is not None
    sidecar = load_sidecar(options.data)
    tokenizer = options.tokenizer or sidecar.tokenizer.path
    if options.tokenizer is None and not Path(tokenizer).exists():
        raise UserError(
            f"{sidecar_path(options.data)}: tokenizer {tokenizer} does not exist; use --tokenizer to set the tokenizer "
            "that the dataset was preprocessed with"
        )
    source = DataSource(path=options.data, language=sidecar.language)
    return DataSection(
        tokenizer=tokenizer,
        sources=[source],
        seq_length=length or DEFAULT_SEQ_LENGTH,
        validation_fraction=0.0,
        eod_mask_loss=recipe is not None and recipe.data.eod_mask_loss,
    )


def _open(options: PreviewOptions, recipe: Recipe | None, data: DataSection) -> "tuple[DictionaryTable, Tokenizer]":
    from megatron_prealign.data.sidecar import load_sidecar
    from megatron_prealign.dictionary.table import load_table
    from megatron_prealign.tokenizer.load import load_tokenizer

    section = recipe.dictionary if recipe is not None else None
    if options.table is not None:
        section = DictionarySection(
            table=options.table, held_out_fraction=section.held_out_fraction if section is not None else 0.0
        )
    if section is None:
        raise UserError(f"{options.config}: section dictionary is missing; add it or use --table")
    table = load_table(section.table)
    for source in data.sources:
        table.check_tokenizer(load_sidecar(source.path).tokenizer.fingerprint, f"dataset {source.path}")
    tokenizer = load_tokenizer(data.tokenizer)
    table.check_tokenizer(tokenizer.fingerprint, f"tokenizer {data.tokenizer}")
    return table.without_groups(table.held_out_groups(section.held_out_fraction)), tokenizer


def _check_length(prefix: str, seq_length: int) -> None:
    from megatron_prealign.data.sidecar import load_sidecar

    tokens = load_sidecar(prefix).tokens
    if tokens <= seq_length:
        raise UserError(
            f"{prefix}: got {tokens} tokens, expected at least --seq-length + 1 = {seq_length + 1}; lower --seq-length"
        )


def _check_page(path: Path) -> None:
    from megatron_prealign.files.directories import check_writable

    if path.is_dir():
        raise UserError(f"--html {path} is a directory, expected a file path")
    check_writable(path.parent, f"--html {path}")


def _write_page(preview: "Preview", path: Path) -> None:
    from megatron_prealign.code_switch.preview_page import render_page
    from megatron_prealign.files.atomic import write_atomically
    from megatron_prealign.files.directories import writing

    with writing(path, "page"), write_atomically(path) as temporary:
        temporary.write_text(render_page(preview), encoding="utf-8")


def _wants_color(choice: str) -> bool:
    if choice != "auto":
        return choice == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _terminal_width() -> int | None:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None
