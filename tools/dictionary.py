"""`megatron-prealign dictionary`: builds and merges word-translation tables, measures them and shows them at work."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import LanguageText, PathText, PrefixText
from megatron_prealign.tools.dictionary_preview import preview
from megatron_prealign.tools.dictionary_report import replaces_nothing, report

if TYPE_CHECKING:
    from megatron_prealign.dictionary.build import BuildReport, BuildSettings
    from megatron_prealign.dictionary.coverage import Coverage
    from megatron_prealign.dictionary.groups import Cleaning
    from megatron_prealign.dictionary.readers import DictionaryInput
    from megatron_prealign.dictionary.running_words import WordCounts
    from megatron_prealign.dictionary.table import DictionaryTable
    from megatron_prealign.tokenizer.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Builds the word-translation table (table.safetensors) from word lists."""

    input: list[PathText]
    """Word lists as FILE:SOURCE-TARGET (list.tsv.gz:en-de), one or more; translations of a word join.

    SOURCE is the language of the headwords. Of files that belong together (dictd, StarDict, PanLex) name any one. Text
    files may be compressed with gzip, zstd or bzip2.
    """
    tokenizer: PathText
    """Hugging Face tokenizer directory or sentencepiece model file, the one the corpora were preprocessed with."""
    output: PathText
    """Table file to write; an older table there is replaced, any other file is not."""
    languages: str | None = None
    """Languages of the columns (en-de, or en-de-fr for lists of three), for inputs that do not name their own."""
    format: Literal[
        "auto",
        "pairs",
        "words",
        "tsv",
        "csv",
        "space",
        "dictd",
        "stardict",
        "cedict",
        "wiktextract",
        "wiktextract-glosses",
        "panlex",
        "pyglossary",
    ] = "auto"
    """Format of the inputs; auto looks at each file.

    pairs is JSON {"src_text", "tgt_text"} a line, words JSON {"words": "a $ b $ c"}; tsv, csv and space (MUSE) have a
    column for each language and with --weights one more; cedict is CC-CEDICT, wiktextract the translations of a
    Wiktionary and wiktextract-glosses its definitions, pyglossary all that this package reads.
    """
    source: LanguageText | None = None
    """Language whose words are to be replaced: lists that have it in another column are turned around."""
    pivot: LanguageText | None = None
    """Join lists over this language: de-en and en-ru become de-ru. The lists themselves serve as a bridge alone."""
    pivot_ambiguous: Literal["drop", "keep"] = "drop"
    """Joined pairs that only one pivot word of several meanings supports."""
    pivot_bridge: bool = False
    """Keep also the pairs of the pivot language."""
    corpus: list[PrefixText] = field(default_factory=list)
    """Prefixes of preprocessed datasets: coverage is measured and words are counted in them."""
    notes: Literal["drop", "keep"] = "drop"
    """Notes in brackets and markup inside words."""
    scripts: Literal["check", "any"] = "check"
    """Leave out pairs with a word that has no letter of any script of its language, and refuse lists whose columns are
    the other way round."""
    min_characters: int = 1
    """Shortest word, in characters."""
    max_characters: int = 100
    """Longest word or phrase, in characters."""
    max_words: int | None = None
    """Longest translation, in words."""
    min_count: int = 0
    """Least occurrences of a source word in the corpora of its language."""
    min_target_count: int = 0
    """Least occurrences of a translation in the corpora of its language."""
    max_translations: int = 4
    """Most translations of a word in one language; the first by --order are kept."""
    order: Literal["file", "weight", "frequency"] = "file"
    """Which translations come first: the lists' own order, the heaviest, or the most frequent in the corpora."""
    max_target_tokens: int = 8
    """Longest translation, in tokens; it may be several words."""
    drop_identical: bool = True
    """Leave out pairs whose two words are the same tokens."""
    licence: str = ""
    """Licence of the lists that do not tell their own, noted in the table."""
    weights: bool = False
    """Every line of a list in columns has one more: the weight of the translation in the draw, a number above 0.

    JSON has it as "weight" without this option, 1 where there is none; of a pair given several times the largest.
    """
    max_tokens: int = 5_000_000
    """Tokens of each corpus to look at."""
    on_error: Literal["stop", "skip"] = "stop"
    """At a line that cannot be read: stop, or skip it and list the first 100."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Puts tables of one tokenizer together, as if their lists had been built into one."""

    table: list[PathText]
    """Table files, two or more; of the translations of a word those of the first table come first."""
    tokenizer: PathText
    """The tokenizer that they were built with."""
    output: PathText
    """Table file to write; an older table there is replaced, any other file is not."""
    max_translations: int = 4
    """Most translations of a word in one language; the first ones are kept."""
    order: Literal["file", "weight"] = "file"
    """Which translations come first: those of the first table, or the heaviest."""
    max_target_tokens: int = 8
    """Longest translation, in tokens."""
    drop_identical: bool = True
    """Leave out pairs whose two words are the same tokens."""


@dataclass(frozen=True, kw_only=True)
class CoverageOptions:
    """Measures which share of the running words of corpora a table knows."""

    table: PathText
    """Table file."""
    corpus: list[PrefixText]
    """Prefixes of preprocessed datasets, one or more."""
    max_tokens: int = 5_000_000
    """Tokens of each corpus to look at."""


def build(argv: Sequence[str]) -> int:
    options = parse_options(BuildOptions, "dictionary build", argv)

    from megatron_prealign.dictionary.build import BuildReport, build_table, read_groups
    from megatron_prealign.dictionary.coverage import count_groups, measure_coverage
    from megatron_prealign.dictionary.pivot import join_over
    from megatron_prealign.dictionary.table_output import check_table_output
    from megatron_prealign.tokenizer.load import load_tokenizer

    settings, cleaning, inputs = _settings(options)
    check_table_output(options.output)
    report = BuildReport()
    tokenizer = load_tokenizer(options.tokenizer)
    groups, sources = read_groups(
        inputs,
        report,
        options.on_error,
        cleaning=cleaning,
        source_language=options.source,
        pivot=options.pivot,
    )
    if options.pivot is not None:
        keep_ambiguous = options.pivot_ambiguous == "keep"
        groups = join_over(
            groups, options.pivot, report.rules, keep_ambiguous=keep_ambiguous, keep_bridge=options.pivot_bridge
        )
    counts = _count_words(options, tokenizer) if settings.needs_counts else None
    table = build_table(groups, tokenizer, settings, report, sources=sources, counts=counts, show_progress=True)
    corpora = [measure_coverage(table, prefix, options.max_tokens) for prefix in options.corpus]
    table = count_groups(table, corpora)
    table.save(options.output)
    _print_report(table, report)
    _print_coverage(table, corpora)
    print(f"wrote {options.output}")
    return 0


def _settings(options: BuildOptions) -> "tuple[BuildSettings, Cleaning, list[DictionaryInput]]":
    """Everything that can be wrong with the options alone, before anything is read."""
    from megatron_prealign.dictionary.build import BuildSettings
    from megatron_prealign.dictionary.groups import Cleaning
    from megatron_prealign.dictionary.readers import parse_input

    settings = BuildSettings(
        max_translations=options.max_translations,
        order=options.order,
        max_target_tokens=options.max_target_tokens,
        drop_identical=options.drop_identical,
        min_count=options.min_count,
        min_target_count=options.min_target_count,
    )
    cleaning = Cleaning(
        notes=options.notes == "drop",
        scripts=options.scripts == "check",
        min_characters=options.min_characters,
        max_characters=options.max_characters,
        max_words=options.max_words,
    )
    inputs = [
        parse_input(text, options.languages, options.format, options.licence, options.weights) for text in options.input
    ]
    if not inputs:
        raise UserError("--input is empty, expected one or more word lists as FILE:SOURCE-TARGET")
    # Unlike Path.resolve it does not mind a link that leads to itself, which reading the list will name.
    if os.path.realpath(options.output) in [os.path.realpath(each.path) for each in inputs]:
        raise UserError(f"--output is {options.output}, one of the lists, which it would overwrite; name another file")
    languages = {language for each in inputs for language in each.languages}
    for name in ("source", "pivot"):
        language = getattr(options, name)
        if language is not None and language not in languages:
            raise UserError(f"--{name} is {language}, expected a language of the lists: {', '.join(sorted(languages))}")
    if settings.needs_counts and not options.corpus:
        raise UserError(
            "--min-count, --min-target-count and --order frequency count words in corpora; name preprocessed datasets "
            "with --corpus"
        )
    return settings, cleaning, inputs


def _count_words(options: BuildOptions, tokenizer: "Tokenizer") -> "WordCounts":
    from megatron_prealign.dictionary.lexicon import letter_boundaries
    from megatron_prealign.dictionary.running_words import count_words

    return count_words(options.corpus, tokenizer, letter_boundaries(tokenizer), options.max_tokens)


def merge(argv: Sequence[str]) -> int:
    options = parse_options(MergeOptions, "dictionary merge", argv)

    from megatron_prealign.dictionary.build import BuildReport, BuildSettings, build_table
    from megatron_prealign.dictionary.merge import merge_counts, merge_groups
    from megatron_prealign.dictionary.table import load_table
    from megatron_prealign.dictionary.table_output import check_table_output
    from megatron_prealign.tokenizer.load import load_tokenizer

    settings = BuildSettings(
        max_translations=options.max_translations,
        order=options.order,
        max_target_tokens=options.max_target_tokens,
        drop_identical=options.drop_identical,
    )
    if len(options.table) < 2:
        raise UserError("--table names one table, expected two or more to put together")
    check_table_output(options.output)
    tokenizer = load_tokenizer(options.tokenizer)
    tables = []
    for path in options.table:
        table = load_table(path)
        table.check_tokenizer(tokenizer.fingerprint, f"tokenizer {options.tokenizer}")
        tables.append(table)
    report = BuildReport()
    groups, sources = merge_groups(tables, report.rules)
    merged = build_table(groups, tokenizer, settings, report, sources=sources, show_progress=True)
    merged = merge_counts(merged, tables)
    merged.save(options.output)
    _print_report(merged, report)
    print(f"wrote {options.output}")
    return 0


def coverage(argv: Sequence[str]) -> int:
    options = parse_options(CoverageOptions, "dictionary coverage", argv)

    from megatron_prealign.dictionary.coverage import measure_coverage
    from megatron_prealign.dictionary.table import load_table

    table = load_table(options.table)
    _print_coverage(table, [measure_coverage(table, prefix, options.max_tokens) for prefix in options.corpus])
    return 0


def _print_report(table: "DictionaryTable", report: "BuildReport") -> None:
    for line in report.errors.first:
        print(f"skipped {line}")
    if report.errors.count > len(report.errors.first):
        print(f"skipped {report.errors.count - len(report.errors.first)} more lines")
    for warning in report.warnings:
        print(f"warning: {warning}")
    if report.errors.count:
        print(f"{report.errors.count:>12,}  lines skipped")
    for name, count in report.rules.items():
        if count:
            print(f"{count:>12,}  {name}")
    print(f"words encoded with {report.encoder}")
    print(f"{table.num_groups:>12,}  groups")
    print(f"{table.num_words:>12,}  words in groups")
    print(f"{table.num_keys:>12,}  keys")
    print(f"{table.num_candidates:>12,}  candidates")


def _print_coverage(table: "DictionaryTable", corpora: "Sequence[Coverage]") -> None:
    replaced = table.replaced_languages()
    for corpus in corpora:
        if corpus.language not in replaced:
            print(replaces_nothing(corpus.prefix, corpus.language, replaced))
            continue
        print(
            f"coverage of {corpus.prefix} ({corpus.language}): {corpus.share:.1%} "
            f"({corpus.known_words:,} of {corpus.running_words:,} running words, {corpus.tokens:,} tokens)"
        )


ACTIONS: Actions = {
    "build": (build, "build a table from word lists"),
    "merge": (merge, "put tables of one tokenizer together"),
    "report": (report, "what a table is worth on corpora, as JSON and HTML"),
    "coverage": (coverage, "share of the running words of corpora that a table knows"),
    "preview": (preview, "what code-switching will do to a dataset, row by row"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `dictionary ACTION`."""
    return run_action("dictionary", ACTIONS, argv)
