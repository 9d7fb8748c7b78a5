"""`megatron-prealign dictionary report`: evaluates a table on corpora, as JSON and as an HTML page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import PathText, PrefixText
from megatron_prealign.text import closing, command, plural

_WORDS_PRINTED = 10


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Evaluates a table on corpora: coverage, switch rate, lengths, ambiguity, unknown words and switched samples."""

    table: PathText
    """Table file."""
    corpus: list[PrefixText]
    """One or more prefixes of preprocessed datasets."""
    output: PathText
    """Directory to write report.json and report.html to."""
    tokenizer: PathText | None = None
    """Tokenizer of the datasets; default: the one recorded in their .json files."""
    ratio: float = 0.05
    """Code-switching ratio assumed for the switch rates, from 0 to 1."""
    samples: int = 20
    """Number of switched words to show for each corpus."""
    frequent_words: int = 50
    """Number of most frequent known words to list with their translations."""
    unknown_words: int = 50
    """Number of most frequent unknown words to list."""
    max_tokens: int = 5_000_000
    """Maximum number of tokens to sample from each corpus."""
    seed: int = 1
    """Seed of the samples."""


def report(argv: Sequence[str]) -> int:
    """Runs `dictionary report`."""
    options = parse_options(ReportOptions, "dictionary report", argv)

    from megatron_prealign.dictionary.report import ReportSettings, make_report
    from megatron_prealign.dictionary.report_page import render_page
    from megatron_prealign.dictionary.table import load_table
    from megatron_prealign.files.atomic import write_all_atomically
    from megatron_prealign.files.directories import check_writable, writing
    from megatron_prealign.tokenizer.base import Tokenizer
    from megatron_prealign.tokenizer.load import load_tokenizer

    settings = ReportSettings(
        ratio=options.ratio,
        max_tokens=options.max_tokens,
        samples=options.samples,
        frequent_words=options.frequent_words,
        unknown_words=options.unknown_words,
        seed=options.seed,
    )
    if not options.corpus:
        raise UserError("--corpus is empty, expected one or more prefixes of preprocessed datasets")
    directory = Path(options.output)
    check_writable(directory, f"--output {directory}")
    table = load_table(options.table)
    loaded: dict[str, Tokenizer] = {}
    paths = [options.tokenizer or _tokenizer_of(prefix) for prefix in options.corpus]
    for path in paths:
        if path not in loaded:
            loaded[path] = load_tokenizer(path)
    result = make_report(table, options.corpus, [loaded[path] for path in paths], settings)
    files = [directory / "report.html", directory / "report.json"]
    with writing(directory / "report.html", "report"), write_all_atomically(files) as (page, values):
        page.write_text(render_page(result), encoding="utf-8")
        values.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    replaced = table.replaced_languages()
    for corpus in result["corpora"]:
        if corpus["language"] not in replaced:
            print(no_keys_message(corpus["prefix"], corpus["language"], replaced))
            continue
        print(
            f"{corpus['prefix']} ({corpus['language']}): {corpus['coverage']:.1%} of {corpus['running_words']:,} "
            f"running words known, {corpus['vocabulary_coverage']:.1%} of {corpus['vocabulary']:,} distinct words, "
            f"{corpus['switch_rate']:.2%} switched at a ratio of {options.ratio:g}"
        )
        words = [f"{each['word']} -> {each['translations'][0]['text']}" for each in corpus["frequent_words"]]
        if words:
            print(f"  most frequent: {', '.join(words[:_WORDS_PRINTED])}")
    made = f"wrote {directory / 'report.json'} and report.html: {plural(len(options.corpus), 'dataset')}"
    switched = [corpus["prefix"] for corpus in result["corpora"] if corpus["language"] in replaced]
    following = [command("dictionary", "preview", "--table", options.table, "--data", each) for each in switched[:1]]
    print(closing(made, *following))
    return 0


def no_keys_message(prefix: str, language: str, replaced: Sequence[str]) -> str:
    """Line printed instead of the coverage for a corpus in a language without keys in the table."""
    return f"{prefix} ({language}): the table has no keys for {language}, only for {', '.join(replaced) or 'none'}"


def _tokenizer_of(prefix: str) -> str:
    from megatron_prealign.data.sidecar import load_sidecar, sidecar_path

    tokenizer = load_sidecar(prefix).tokenizer.path
    if not Path(tokenizer).exists():
        raise UserError(
            f"{sidecar_path(prefix)}: tokenizer {tokenizer} does not exist; use --tokenizer to set the tokenizer that "
            "the dataset was preprocessed with"
        )
    return tokenizer
