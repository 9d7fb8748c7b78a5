"""`megatron-prealign dictionary`: builds the word-translation table, measures its coverage and shows it at work."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli import Actions, parse_options, run_action
from megatron_prealign.errors import UserError
from megatron_prealign.tools.dictionary_preview import preview

if TYPE_CHECKING:
    from megatron_prealign.dictionary.build import BuildReport
    from megatron_prealign.dictionary.coverage import Coverage
    from megatron_prealign.dictionary.table import DictionaryTable


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Builds the word-translation table (table.safetensors) from word lists."""

    input: list[str]
    """Word lists as FILE:SOURCE-TARGET (list.tsv.gz:en-de), one or more; translations of a word join."""
    tokenizer: str
    """Hugging Face tokenizer folder or sentencepiece model file, the one the corpora were preprocessed with."""
    output: str
    """Table file to write."""
    languages: str | None = None
    """Languages of the columns (en-de, or en-de-fr for lists of three), for inputs that do not name their own."""
    format: Literal["auto", "pairs", "words", "tsv", "space"] = "auto"
    """Format of the inputs; auto looks at each file.

    pairs is JSON {"src_text", "tgt_text"} a line, words JSON {"words": "a $ b $ c"}, tsv two columns, space two words
    (MUSE), with --weights one more.
    """
    corpus: list[str] = field(default_factory=list)
    """Prefixes of preprocessed datasets in the source languages: coverage is measured and words are counted in them."""
    max_translations: int = 4
    """Most translations of a word in one language; the first of the lists are kept."""
    max_target_tokens: int = 8
    """Longest translation, in tokens; it may be several words."""
    drop_identical: bool = True
    """Leave out pairs whose two words are the same tokens."""
    licence: str = ""
    """Licence of the lists, noted in the table."""
    weights: bool = False
    """Every line of a list in columns has one more: the weight of the translation in the draw, a number above 0.

    JSON has it as "weight" without this option, 1 where there is none; of a pair given several times the largest.
    """
    max_tokens: int = 5_000_000
    """Tokens of each corpus to look at."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a line that cannot be read: stop, or skip it and list the first 100."""


@dataclass(frozen=True, kw_only=True)
class CoverageOptions:
    """Measures which share of the running words of corpora a table knows."""

    table: str
    """Table file."""
    corpus: list[str]
    """Prefixes of preprocessed datasets, one or more."""
    max_tokens: int = 5_000_000
    """Tokens of each corpus to look at."""


def build(argv: Sequence[str]) -> int:
    options = parse_options(BuildOptions, "dictionary build", argv)

    from megatron_prealign.data.tokenizer import load_tokenizer
    from megatron_prealign.dictionary.build import BuildReport, BuildSettings, build_table, read_groups
    from megatron_prealign.dictionary.coverage import count_groups, measure_coverage
    from megatron_prealign.dictionary.readers import parse_input

    settings = BuildSettings(
        max_translations=options.max_translations,
        max_target_tokens=options.max_target_tokens,
        drop_identical=options.drop_identical,
    )
    inputs = [
        parse_input(text, options.languages, options.format, options.licence, options.weights) for text in options.input
    ]
    if not inputs:
        raise UserError("--input is empty, expected one or more word lists as FILE:SOURCE-TARGET")
    report = BuildReport()
    tokenizer = load_tokenizer(options.tokenizer)
    groups, sources = read_groups(inputs, report, options.on_error)
    table = build_table(groups, tokenizer, settings, report, sources=sources, show_progress=True)
    corpora = [measure_coverage(table, prefix, options.max_tokens) for prefix in options.corpus]
    table = count_groups(table, corpora)
    table.save(options.output)
    _print_report(table, report)
    _print_coverage(corpora)
    print(f"wrote {options.output}")
    return 0


def coverage(argv: Sequence[str]) -> int:
    options = parse_options(CoverageOptions, "dictionary coverage", argv)

    from megatron_prealign.dictionary.coverage import measure_coverage
    from megatron_prealign.dictionary.table import load_table

    table = load_table(options.table)
    _print_coverage([measure_coverage(table, prefix, options.max_tokens) for prefix in options.corpus])
    return 0


def _print_report(table: "DictionaryTable", report: "BuildReport") -> None:
    for line in report.errors.first:
        print(f"skipped {line}")
    if report.errors.count > len(report.errors.first):
        print(f"skipped {report.errors.count - len(report.errors.first)} more lines")
    print(f"{report.errors.count:>12,}  lines skipped")
    for name, count in report.rules.items():
        print(f"{count:>12,}  {name}")
    print(f"words encoded with {report.encoder}")
    print(f"{table.num_groups:>12,}  groups")
    print(f"{table.num_words:>12,}  words in groups")
    print(f"{table.num_keys:>12,}  keys")
    print(f"{table.num_candidates:>12,}  candidates")


def _print_coverage(corpora: "Sequence[Coverage]") -> None:
    for corpus in corpora:
        print(
            f"coverage of {corpus.prefix} ({corpus.language}): {corpus.share:.1%} "
            f"({corpus.known_words:,} of {corpus.running_words:,} running words, {corpus.tokens:,} tokens)"
        )


ACTIONS: Actions = {
    "build": (build, "build a table from word lists"),
    "coverage": (coverage, "share of the running words of corpora that a table knows"),
    "preview": (preview, "what code-switching will do to a dataset, row by row"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `dictionary ACTION`."""
    return run_action("dictionary", ACTIONS, argv)
