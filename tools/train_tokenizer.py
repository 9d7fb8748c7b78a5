"""`megatron-prealign train-tokenizer`: a tokenizer out of text of one or several languages."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.options import parse_options
from megatron_prealign.recipe.describe import LanguageText, PathText

if TYPE_CHECKING:
    from megatron_prealign.preprocess.train_tokenizer import TrainingReport


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerOptions:
    """Trains a tokenizer, byte-level BPE or sentencepiece, and reports how finely it cuts each language."""

    input: list[PathText]
    """What to read, one or more, each as NAME or NAME:LANGUAGE (data/de:de).

    NAME is a file (.jsonl with one object a line, .txt with documents separated by blank lines, both also .gz, .zst or
    .bz2, or .parquet), a directory, a pattern such as 'data/**/*.jsonl.gz' or hf:DATASET[,CONFIG][:SPLIT].
    """
    output: PathText
    """Directory to write; it must not exist yet."""
    vocab_size: int
    """Tokens in the vocabulary, <eod> and the 256 bytes included."""
    kind: Literal["byte-bpe", "sentencepiece-unigram", "sentencepiece-bpe"] = "byte-bpe"
    """byte-bpe writes a Hugging Face tokenizer directory, the others a sentencepiece model with byte fallback."""
    temperature: float = 1.0
    """Evens languages out: the share of a language is in proportion to its bytes to the power of 1/temperature."""
    sample_bytes: int | None = None
    """Bytes of text to learn from, drawn evenly over the input; by default 200 MB, for sentencepiece 100 MB."""
    held_out: float = 0.05
    """Share of the documents that is only measured on; of each language at most 1 MB."""
    seed: int = 0
    """Of the draw of documents."""
    segmenter: list[str] = field(default_factory=list)
    """LANGUAGE=NAME each, or auto: tokens do not reach across the words of languages without spaces.

    NAME as in preprocess (jieba, sudachi, newmm, icu, module:Class); auto is for all inputs that need one.
    """
    character_coverage: float = 0.9995
    """sentencepiece: share of the running characters that get tokens of their own; the others become bytes."""
    clone_language: LanguageText | None = None
    """Makes it a clone tokenizer with twice the ids, the upper half for this language code (English-Clone study)."""
    text_key: list[str] = field(default_factory=lambda: ["text"])
    """Keys of the text in each JSON object or row, nested ones with dots (data.text); several are joined by a line
    break."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a bad document or a damaged file."""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments behind its name."""
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
    )
    tokenizer = load_tokenizer(options.output)
    print(f"wrote {options.output}: {tokenizer.vocab_size:,} ids, end of document {tokenizer.eod_id}")
    _print_languages(report)
    print(f"the same in {options.output}/{REPORT_FILE}")
    print(f"skipped {report.problems.count:,}")
    for problem in report.problems.listed[:5]:
        print(f"  {problem.where}: {problem.why}")
    return 0


def _print_languages(report: "TrainingReport") -> None:
    width = max(8, *(len(language) for language in report.languages))
    print(
        f"{'language':<{width}}  {'text MB':>10}  {'learnt from':>11}  {'share':>6}  {'tokens/word':>11}  "
        f"{'bytes/token':>11}  {'fallback':>8}  words by"
    )
    total = sum(one.sample.bytes for one in report.languages.values())
    for language, one in report.languages.items():
        cut = one.fertility
        assert cut is not None, "the training measures every language"
        words = "-" if cut.tokens_per_word is None else f"{cut.tokens_per_word:.2f}"
        print(
            f"{language:<{width}}  {one.count.bytes / 1e6:>10,.2f}  {one.sample.bytes / 1e6:>11,.2f}  "
            f"{one.sample.bytes / max(total, 1):>6.1%}  {words:>11}  {cut.bytes_per_token:>11.2f}  "
            f"{cut.fallback_share:>8.2%}  {cut.words_by or 'nobody (see --segmenter)'}"
            + ("" if cut.held_out else "; measured on what it learnt from")
        )
