"""`megatron-prealign preprocess`: text files to .bin/.idx token files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import LanguageText, PathText, PrefixText
from megatron_prealign.resources import available_cores

if TYPE_CHECKING:
    from megatron_prealign.preprocess.run import PreprocessResult

_MOST_MEBIBYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Turns text files into PREFIX.bin, PREFIX.idx (Megatron-Core's format) and PREFIX.json (what they hold). With a
    segmenter also PREFIX.words, one bit a token: does a word start here?"""

    input: list[PathText]
    """What to read, one or more: files, directories, patterns ('data/*.jsonl.gz') or hf:NAME[,CONFIG][:SPLIT].

    .jsonl (one object a line) and .txt (documents separated by blank lines), also with .gz, .zst or .bz2, and .parquet.
    """
    tokenizer: PathText
    """Hugging Face tokenizer directory or sentencepiece .model file."""
    output: PrefixText
    """PREFIX: path of the files to write, without the ending.

    Several text keys write PREFIX_KEY, a language key PREFIX_LANGUAGE, a shard PREFIX_00003-of-00008."""
    language: LanguageText | None = None
    """Language code of the documents, as in the dictionary (en, de, ...)."""
    language_key: str | None = None
    """Instead of --language: key of the language code in each document; a dataset for each language is written."""
    text_key: list[str] = field(default_factory=lambda: ["text"])
    """Key of the text in each object or row, nested with dots (data.text); of several, each makes a dataset."""
    join: str | None = None
    """Makes one document of several text keys, with this between them; \\n is a line break."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a bad document or a damaged file; skipped ones are listed in PREFIX.json."""
    segmenter: str | None = None
    """Who finds the words of a script without spaces: jieba (Chinese), sudachi (Japanese), newmm (Thai), icu (any), all
    from the extra megatron-prealign[segmenters], auto by language, or module:Class for your own; by default nobody."""
    workers: int | None = None
    """Processes that tokenise; by default one for each CPU core this process may use."""
    shard: str | None = None
    """Reads one of N equal parts only, as I/N from 1/N to N/N; `megatron-prealign dataset merge` joins them."""
    resume: bool = False
    """Goes on from an unfinished run with the same options; leaves a finished one as it is."""
    overwrite: bool = False
    """Replaces a dataset that lies there already."""
    engine: Literal["auto", "plain"] = "auto"
    """Auto encodes with gigatoken where it takes the tokenizer and gives the same ids on samples, else and with plain
    the tokenizer's own library does."""
    max_document_mb: float = 16
    """Longest document in MiB of the file; a longer one is an error."""
    save_every_mb: float = 256
    """MiB of text after which the work is saved, for --resume."""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments behind its name."""
    options = parse_options(PreprocessOptions, "preprocess", argv)

    import signal

    from megatron_prealign.corpus.blocks import Limits
    from megatron_prealign.corpus.readers import Fields
    from megatron_prealign.preprocess.run import PreprocessSettings, preprocess

    joined_by = None if options.join is None else options.join.replace("\\n", "\n").replace("\\t", "\t")
    settings = PreprocessSettings(
        language=options.language,
        fields=Fields(tuple(options.text_key), joined_by, options.language_key),
        on_error=options.on_error,
        workers=available_cores() if options.workers is None else options.workers,
        segmenter=options.segmenter,
        shard=_shard(options.shard),
        resume=options.resume,
        overwrite=options.overwrite,
        use_fast_engine=options.engine == "auto",
        limits=Limits(document_bytes=_bytes("max-document-mb", options.max_document_mb)),
        save_every_bytes=_bytes("save-every-mb", options.save_every_mb),
    )
    for name in ("SIGTERM", "SIGHUP"):
        # As Ctrl-C: a job that is cancelled says what is kept.
        signal.signal(getattr(signal, name), signal.default_int_handler)
    _print(preprocess(options.input, options.tokenizer, options.output, settings))
    return 0


def _bytes(option: str, mebibytes: float) -> int:
    # Not a number is no number above 0, either.
    if not 0 < mebibytes < _MOST_MEBIBYTES:
        raise UserError(f"--{option} is {mebibytes:g}; expected a number of MiB above 0")
    return max(int(mebibytes * (1 << 20)), 1)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
        raise UserError(f"--shard is {text!r}; expected I/N such as 1/8")
    return int(number), int(count)


def _print(result: "PreprocessResult") -> None:
    for prefix, facts in result.outputs.items():
        if not result.seconds:
            print(f"{prefix}: already there, complete, of the same inputs and options")
            continue
        bitmap = "" if facts.segmenter is None else f", .words (by {facts.segmenter})"
        print(f"wrote {prefix}.bin, .idx{bitmap} and .json")
        print(f"language         {facts.language}")
        print(f"documents        {facts.documents:,}")
        print(f"tokens           {facts.tokens:,} (with one end-of-document token each)")
        print(f"text             {facts.bytes:,} bytes")
        print(f"encoded by       {facts.engine}")
    if result.text_bytes:
        print(f"speed            {result.text_bytes / result.seconds / 1e6:.2f} MB of text a second")
    # Where a segmenter marks the words, white space does not tell them.
    if result.seconds and all(facts.segmenter is None for facts in result.outputs.values()):
        print(f"tokens per word  {result.tokens_per_word:.2f} (words between white space, in a sample)")
    if not result.outputs:
        print("no document in this shard, and no language to write an empty dataset for")
        return
    prefix, facts = next(iter(result.outputs.items()))
    print(f"skipped          {facts.skipped_count:,}")
    for problem in facts.skipped[:5]:
        # File names that are not UTF-8 cannot be printed as they are.
        print(f"  {problem.where}: {problem.why}".encode(errors="backslashreplace").decode())
    if facts.skipped_count > 5:
        print(f"  ... the first {len(facts.skipped)} are listed in {prefix}.json")
