"""`megatron-prealign train-tokenizer`: trains a tokenizer on text of one or several languages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.options import parse_options
from megatron_prealign.recipe.describe import LanguageText, PathText
from megatron_prealign.text import closing, command, plural, readable_bytes

if TYPE_CHECKING:
    from megatron_prealign.preprocess.train_tokenizer import TrainingReport


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerOptions:
    """Trains a byte-level BPE or sentencepiece tokenizer and reports its fertility per language."""

    input: list[PathText]
    """One or more inputs, each NAME or NAME:LANGUAGE (data/de:de).

    NAME is a file (.jsonl with one object per line or .txt with documents separated by blank lines, optionally with
    .gz, .zst or .bz2, or .parquet), a directory, a pattern such as 'data/**/*.jsonl.gz' or
    hf:DATASET[,CONFIG][:SPLIT].
    """
    output: PathText
    """Output directory; must not exist yet or be empty."""
    vocab_size: int
    """Vocabulary size, including <eod> and the 256 bytes."""
    kind: Literal["byte-bpe", "sentencepiece-unigram", "sentencepiece-bpe"] = "byte-bpe"
    """Tokenizer type: byte-bpe writes Hugging Face files, the others a sentencepiece model with byte fallback."""
    temperature: float = 1.0
    """Balance languages: the share of a language is proportional to its bytes to the power of 1/temperature."""
    sample_bytes: int | None = None
    """Bytes of training text, sampled uniformly from the input; default: 200 MB, for sentencepiece 100 MB."""
    held_out: float = 0.05
    """Fraction of the documents held out to measure fertility; at most 1 MB per language."""
    seed: int = 0
    """Seed for sampling documents."""
    segmenter: list[str] = field(default_factory=list)
    """Keep tokens within words in languages without spaces: LANGUAGE=NAME for each language, or auto.

    NAME is a segmenter as in preprocess (jieba, sudachi, newmm, icu, module:Class); auto selects one for all inputs
    that need it.
    """
    character_coverage: float = 0.9995
    """sentencepiece: fraction of character occurrences that get their own tokens; the others become bytes."""
    clone_language: LanguageText | None = None
    """Add an artificial clone language with this code (English-Clone study); its ids are shifted by the size of the
    vocabulary."""
    clone_shared_ids: int = 0
    """Number of ids that both languages have in common: the bytes, then the most frequent parts of words."""
    text_key: list[str] = field(default_factory=lambda: ["text"])
    """Keys of the text in each JSON object or row, nested with dots (data.text). Several keys are joined by a line
    break."""
    on_error: Literal["stop", "skip"] = "stop"
    """Action for bad documents and corrupt files."""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after its name."""
    options = parse_options(TrainTokenizerOptions, "train-tokenizer", argv)

    from megatron_prealign.preprocess.train_tokenizer import REPORT_FILE, TrainerSettings, train_tokenizer
    from megatron_prealign.tokenizer.load import load_tokenizer

    settings = TrainerSettings(
        kind=options.kind,
        temperature=options.temperature,
        sample_bytes=options.sample_bytes,
        held_out=options.held_out,
        seed=options.seed,
        segmenters=options.segmenter,
        character_coverage=options.character_coverage,
    )
    report = train_tokenizer(
        options.input,
        options.output,
        options.vocab_size,
        options.clone_language,
        options.text_key,
        options.on_error,
        settings=settings,
        clone_shared_ids=options.clone_shared_ids,
    )
    tokenizer = load_tokenizer(options.output)
    _print_languages(report)
    print(f"report: {options.output}/{REPORT_FILE}")
    print(f"skipped {report.problems.count:,}")
    for problem in report.problems.listed[:5]:
        print(f"  {problem.where}: {problem.why}")
    sampled = sum(one.sample.bytes for one in report.languages.values())
    print(
        closing(
            f"wrote {options.output}: {plural(tokenizer.vocab_size, 'id')}, end of document {tokenizer.eod_id}, from "
            f"{readable_bytes(sampled)} of text in {plural(len(report.languages), 'language')}",
            *_preprocess_commands(options.input, options.output),
        )
    )
    return 0


def _preprocess_commands(inputs: Sequence[str], tokenizer: str) -> list[str]:
    """Commands that preprocess the same inputs with the tokenizer, one per language."""
    from megatron_prealign.corpus.inputs import split_language

    by_language: dict[str, list[str]] = {}
    for text in inputs:
        name, language = split_language(text)
        if language is not None:
            by_language.setdefault(language, []).append(name)
    if not by_language:
        return [command("preprocess", "--help")]
    return [
        command(
            *("preprocess", "--input", *names, "--tokenizer", tokenizer),
            *("--output", Path(tokenizer).parent / language, "--language", language),
        )
        for language, names in by_language.items()
    ]


def _print_languages(report: "TrainingReport") -> None:
    width = max(8, *(len(language) for language in report.languages))
    print(
        f"{'language':<{width}}  {'text MB':>10}  {'trained on':>11}  {'share':>6}  {'tokens/word':>11}  "
        f"{'bytes/token':>11}  {'fallback':>8}  segmentation"
    )
    total = sum(one.sample.bytes for one in report.languages.values())
    for language, one in report.languages.items():
        fertility = one.fertility
        assert fertility is not None, "training measures every language"
        words = "-" if fertility.tokens_per_word is None else f"{fertility.tokens_per_word:.2f}"
        print(
            f"{language:<{width}}  {one.count.bytes / 1e6:>10,.2f}  {one.sample.bytes / 1e6:>11,.2f}  "
            f"{one.sample.bytes / max(total, 1):>6.1%}  {words:>11}  {fertility.bytes_per_token:>11.2f}  "
            f"{fertility.fallback_share:>8.2%}  {fertility.words_by or 'none (see --segmenter)'}"
            + ("" if fertility.held_out else "; measured on training text")
        )
