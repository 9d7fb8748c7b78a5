"""`megatron-prealign dictionary`: makes word lists and word-translation tables, evaluates and previews them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.dictionary.formats.base import FileFormat
from megatron_prealign.errors import UserError
from megatron_prealign.recipe import DictionarySection
from megatron_prealign.recipe.describe import LanguageText, PathText, PrefixText
from megatron_prealign.text import closing, command, next_line, plural
from megatron_prealign.tools.dictionary_induce import induce
from megatron_prealign.tools.dictionary_preview import preview
from megatron_prealign.tools.dictionary_report import no_keys_message, report

if TYPE_CHECKING:
    from megatron_prealign.dictionary.build import BuildSettings
    from megatron_prealign.dictionary.build_report import BuildReport
    from megatron_prealign.dictionary.coverage import Coverage
    from megatron_prealign.dictionary.groups import Cleaning
    from megatron_prealign.dictionary.readers import DictionaryInput
    from megatron_prealign.dictionary.running_words import WordCounts
    from megatron_prealign.dictionary.table import DictionaryTable
    from megatron_prealign.tokenizer.base import Tokenizer


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """Builds a word-translation table (table.safetensors) from word lists."""

    input: list[PathText]
    """One or more word lists as FILE:SOURCE-TARGET (list.tsv.gz:en-de); translations of the same word are merged.

    SOURCE is the language of the headwords. For multi-file dictionaries (dictd, StarDict, PanLex), give any one file.
    Text files may be compressed with gzip, zstd or bzip2.
    """
    tokenizer: PathText
    """Hugging Face tokenizer directory or sentencepiece model file that the corpora were preprocessed with."""
    output: PathText
    """Table file to write. An existing table is overwritten, other files are not."""
    languages: str | None = None
    """Languages of the columns (en-de, or en-de-fr for three columns) for inputs without a language suffix."""
    format: FileFormat = "auto"
    """Format of the inputs; auto detects the format of each file.

    pairs is one JSON {"src_text", "tgt_text"} per line, words one JSON {"words": "a $ b $ c"} per line. tsv, csv and
    space (MUSE) have one column per language, plus one with --weights. cedict is CC-CEDICT, wiktextract the
    translations of a Wiktionary, wiktextract-glosses its definitions, and pyglossary any format that pyglossary reads.
    """
    source: LanguageText | None = None
    """Language whose words are replaced. Lists that have it in another column are reversed."""
    pivot: LanguageText | None = None
    """Join lists through this pivot language: de-en and en-ru become de-ru. The pairs of the pivot itself are
    dropped."""
    pivot_ambiguous: Literal["drop", "keep"] = "drop"
    """Whether to drop or keep joined pairs that are supported by only one ambiguous pivot word."""
    pivot_bridge: bool = False
    """Also keep the pairs of the pivot language."""
    corpus: list[PrefixText] = field(default_factory=list)
    """Prefixes of preprocessed datasets for measuring coverage and counting words."""
    notes: Literal["drop", "keep"] = "drop"
    """Whether to drop or keep notes in brackets and markup in words."""
    scripts: Literal["check", "any"] = "check"
    """With check, drop pairs with a word that has no letter of its language's scripts, and reject lists with swapped
    columns."""
    min_characters: int = 1
    """Minimum length of a word in characters."""
    max_characters: int = 100
    """Maximum length of a word or phrase in characters."""
    max_words: int | None = None
    """Maximum length of a translation in words."""
    min_count: int = 0
    """Minimum number of occurrences of a source word in the corpora of its language."""
    min_target_count: int = 0
    """Minimum number of occurrences of a translation in the corpora of its language."""
    max_translations: int = 4
    """Maximum number of translations of a word per language; the first ones by --order are kept."""
    order: Literal["file", "weight", "frequency"] = "file"
    """Order of translations: order of the lists, descending weight, or descending frequency in the corpora."""
    max_target_tokens: int = 8
    """Maximum length of a translation in tokens; it may have several words."""
    drop_identical: bool = True
    """Drop pairs whose two words have identical tokens."""
    licence: str = ""
    """Licence to store in the table for lists that do not state one."""
    weights: bool = False
    """Lists in columns have an extra last column with the sampling weight of the translation, a number above 0.

    JSON lists may have "weight" without this option (default 1). A repeated pair gets its largest weight.
    """
    max_tokens: int = 5_000_000
    """Maximum number of tokens to sample from each corpus."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a malformed line: stop, or skip it and list the first 100."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merges tables of the same tokenizer, as if one table had been built from all their lists."""

    table: list[PathText]
    """Two or more table files; translations of earlier tables come first."""
    tokenizer: PathText
    """Tokenizer that the tables were built with."""
    output: PathText
    """Table file to write. An existing table is overwritten, other files are not."""
    max_translations: int = 4
    """Maximum number of translations of a word per language; the first ones are kept."""
    order: Literal["file", "weight"] = "file"
    """Order of translations: order of the tables, or descending weight."""
    max_target_tokens: int = 8
    """Maximum length of a translation in tokens."""
    drop_identical: bool = True
    """Drop pairs whose two words have identical tokens."""


@dataclass(frozen=True, kw_only=True)
class CoverageOptions:
    """Measures the percentage of running words in corpora that a table covers."""

    table: PathText
    """Table file."""
    corpus: list[PrefixText]
    """One or more prefixes of preprocessed datasets."""
    max_tokens: int = 5_000_000
    """Maximum number of tokens to sample from each corpus."""


@dataclass(frozen=True, kw_only=True)
class ShuffleOptions:
    """Writes the control of a table: every word gets the translations of another word.

    A run with it shows how much of an effect does not come from true pairs. Words, their counts, the lengths of
    translations and how often each is used stay nearly the same.
    """

    table: PathText
    """Table file."""
    output: PathText
    """Table file to write. An existing table is overwritten, other files are not."""
    seed: int = 0
    """Seed of the shuffle; equal seeds give equal tables."""
    share: float = 1.0
    """Fraction of the words that get the translations of another word. Below 1 the table is no control but one with
    noise, to measure how much the method tolerates."""
    held_out_fraction: float = DictionarySection.held_out_fraction
    """dictionary.held_out_fraction of the runs: the words that it holds out get translations of each other, so that the
    control does not train them either."""


def build(argv: Sequence[str]) -> int:
    options = parse_options(BuildOptions, "dictionary build", argv)

    from megatron_prealign.dictionary.build import build_table, read_groups
    from megatron_prealign.dictionary.build_report import BuildReport
    from megatron_prealign.dictionary.coverage import count_groups, measure_coverage
    from megatron_prealign.dictionary.formats.language_codes import language_name_warnings
    from megatron_prealign.dictionary.pivot import join_over
    from megatron_prealign.dictionary.table_output import check_table_output
    from megatron_prealign.tokenizer.load import load_tokenizer

    settings, cleaning, inputs = _settings(options)
    check_table_output(options.output)
    report = BuildReport()
    report.warnings += language_name_warnings(dict.fromkeys(code for each in inputs for code in each.languages))
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
    if options.corpus and not options.min_count:
        occurring = int((table.group_count > 0).sum())
        print(
            f"{occurring:,} of {plural(table.num_groups, 'group')} occur in the corpora; --min-count 1 keeps only these"
        )
    print(_closing(table, options.output, options.corpus))
    return 0


def _closing(table: "DictionaryTable", output: str, corpora: Sequence[str]) -> str:
    """Last lines of an action that wrote a table."""
    made = f"wrote {output}: {plural(table.num_keys, 'key')} with {plural(table.num_candidates, 'translation')}"
    return closing(made, _report_command(output, corpora))


def _report_command(table: str, corpora: Sequence[str]) -> str:
    if not corpora:
        return command("dictionary", "report", "--help")
    directory = Path(table).parent / "dictionary_report"
    return command("dictionary", "report", "--table", table, "--corpus", *corpora, "--output", directory)


def _settings(options: BuildOptions) -> "tuple[BuildSettings, Cleaning, list[DictionaryInput]]":
    """Checks the options and converts them, before any file is read."""
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
    # Unlike Path.resolve, realpath does not raise on a symlink loop, which is reported when the list is read.
    if os.path.realpath(options.output) in [os.path.realpath(each.path) for each in inputs]:
        raise UserError(f"--output {options.output} would overwrite an input list; choose another path")
    languages = {language for each in inputs for language in each.languages}
    for name in ("source", "pivot"):
        language = getattr(options, name)
        if language is not None and language not in languages:
            raise UserError(f"--{name} is {language}, expected a language of the lists: {', '.join(sorted(languages))}")
    if settings.needs_counts and not options.corpus:
        raise UserError(
            "--min-count, --min-target-count and --order frequency need word counts of corpora; add preprocessed "
            "datasets with --corpus"
        )
    return settings, cleaning, inputs


def _count_words(options: BuildOptions, tokenizer: "Tokenizer") -> "WordCounts":
    from megatron_prealign.dictionary.lexicon import letter_boundaries
    from megatron_prealign.dictionary.running_words import count_words

    return count_words(options.corpus, tokenizer, letter_boundaries(tokenizer), options.max_tokens)


def merge(argv: Sequence[str]) -> int:
    options = parse_options(MergeOptions, "dictionary merge", argv)

    from megatron_prealign.dictionary.build import BuildSettings, build_table
    from megatron_prealign.dictionary.build_report import BuildReport
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
        raise UserError(f"--table: got {len(options.table)} table, expected two or more to merge")
    check_table_output(options.output)
    tokenizer = load_tokenizer(options.tokenizer)
    tables = []
    for path in options.table:
        table = load_table(path)
        table.check_tokenizer(tokenizer.fingerprint, f"tokenizer {options.tokenizer}")
        if table.shuffled:
            raise UserError(
                f"--table {path} is a shuffled table; merge the tables of true pairs and shuffle the result"
            )
        tables.append(table)
    report = BuildReport()
    groups, sources = merge_groups(tables, report.rules)
    merged = build_table(groups, tokenizer, settings, report, sources=sources, show_progress=True)
    merged = merge_counts(merged, tables)
    merged.save(options.output)
    _print_report(merged, report)
    print(_closing(merged, options.output, []))
    return 0


def shuffle(argv: Sequence[str]) -> int:
    options = parse_options(ShuffleOptions, "dictionary shuffle", argv)

    from megatron_prealign.dictionary.shuffle import shuffle_table
    from megatron_prealign.dictionary.table import load_table
    from megatron_prealign.dictionary.table_output import check_table_output

    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}, expected a non-negative integer")
    if not 0 < options.share <= 1:
        raise UserError(f"--share is {options.share}, expected a number above 0 and at most 1")
    if not 0 <= options.held_out_fraction < 1:
        raise UserError(
            f"--held-out-fraction is {options.held_out_fraction}, expected a number from 0 to below 1, as in the recipe"
        )
    if os.path.realpath(options.output) == os.path.realpath(options.table):
        raise UserError(f"--output {options.output} would overwrite --table; choose another path")
    check_table_output(options.output)
    table, report = shuffle_table(
        load_table(options.table), options.seed, options.share, held_out_fraction=options.held_out_fraction
    )
    table.save(options.output)
    print(f"{plural(report.moved, 'word')} with the translations of another word")
    print(f"{report.equal_tokens:>7.1%}  of them with a first translation of as many tokens as the true one")
    print(f"{report.similar_counts:>7.1%}  of them with translations of a word at most twice or half as frequent")
    if report.kept:
        print(f"warning: {plural(report.kept, 'word')} with their own translations, since no similar word has others")
    what = "control of" if table.is_control else f"{options.share:.0%} noise in"
    made = f"wrote {options.output}: {what} {options.table}, seed {options.seed}"
    print(closing(made, command("pretrain", "--config", "RECIPE", "--dictionary.table", options.output)))
    return 0


def coverage(argv: Sequence[str]) -> int:
    options = parse_options(CoverageOptions, "dictionary coverage", argv)

    from megatron_prealign.dictionary.coverage import measure_coverage
    from megatron_prealign.dictionary.table import load_table

    table = load_table(options.table)
    _print_coverage(table, [measure_coverage(table, prefix, options.max_tokens) for prefix in options.corpus])
    print(next_line(_report_command(options.table, options.corpus)))
    return 0


def _print_report(table: "DictionaryTable", report: "BuildReport") -> None:
    for line in report.errors.first:
        print(f"skipped {line}")
    if report.errors.count > len(report.errors.first):
        print(f"skipped {plural(report.errors.count - len(report.errors.first), 'more line')}")
    for warning in report.warnings:
        print(f"warning: {warning}")
    for name, count in report.counted.items():
        print(f"{count:>12,}  {name}")
    for title, counts in (
        ("dropped:", report.dropped),
        ("spellings of kept words without a key of their own:", report.spellings_without_key),
    ):
        if counts:
            print(title)
        for name, count in counts.items():
            print(f"{count:>12,}  {name}")
    print(f"tokenised words with {report.encoder}")
    print(f"{table.num_groups:>12,}  groups")
    print(f"{table.num_words:>12,}  words in groups")
    print(f"{table.num_keys:>12,}  keys")
    print(f"{table.num_candidates:>12,}  candidates")


def _print_coverage(table: "DictionaryTable", corpora: "Sequence[Coverage]") -> None:
    replaced = table.replaced_languages()
    for corpus in corpora:
        if corpus.language not in replaced:
            print(no_keys_message(corpus.prefix, corpus.language, replaced))
            continue
        print(
            f"coverage of {corpus.prefix} ({corpus.language}): {corpus.share:.1%} "
            f"({corpus.known_words:,} of {plural(corpus.running_words, 'running word')}, "
            f"{plural(corpus.tokens, 'token')})"
        )


ACTIONS: Actions = {
    "induce": (induce, "make a word list from parallel text"),
    "build": (build, "build a table from word lists"),
    "merge": (merge, "merge tables of the same tokenizer"),
    "shuffle": (shuffle, "write the control of a table, with the translations of other words"),
    "report": (report, "evaluate a table on corpora, as JSON and HTML"),
    "coverage": (coverage, "measure the percentage of running words in corpora that a table covers"),
    "preview": (preview, "show the effect of code-switching on samples of a dataset"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `dictionary ACTION`."""
    return run_action("dictionary", ACTIONS, argv)
