"""`megatron-prealign preprocess`: converts text files to .bin/.idx token files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import LanguageText, PathText, PrefixText
from megatron_prealign.resources import available_cores
from megatron_prealign.text import closing, command, plural, readable_bytes

if TYPE_CHECKING:
    from megatron_prealign.preprocess.run import PreprocessResult

_MOST_MEBIBYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Converts text files to PREFIX.bin and PREFIX.idx (Megatron-Core's format) and PREFIX.json (metadata). With a
    segmenter, also writes PREFIX.words, one bit per token that marks word starts."""

    input: list[PathText]
    """One or more inputs: files, directories, patterns ('data/*.jsonl.gz') or hf:NAME[,CONFIG][:SPLIT].

    Supports .jsonl (one object per line) and .txt (documents separated by blank lines), optionally with .gz, .zst or
    .bz2, and .parquet.
    """
    tokenizer: PathText
    """Hugging Face tokenizer directory or sentencepiece .model file."""
    output: PrefixText
    """Output path without extension (PREFIX).

    Several text keys write PREFIX_KEY, a language key PREFIX_LANGUAGE, a shard PREFIX_00003-of-00008."""
    language: LanguageText | None = None
    """Language code of all documents, as in the dictionary (en, de, ...)."""
    language_key: str | None = None
    """Key of the language code in each document, instead of --language. Writes one dataset per language."""
    text_key: list[str] = field(default_factory=lambda: ["text"])
    """Key of the text in each object or row, nested with dots (data.text). Several keys write one dataset each."""
    join: str | None = None
    """Join several text keys into one document with this separator; \\n is a line break."""
    on_error: Literal["stop", "skip"] = "stop"
    """Action for bad documents and corrupt files; skipped ones are listed in PREFIX.json."""
    segmenter: str | None = None
    """Segmenter for scripts without spaces: jieba (Chinese), sudachi (Japanese), newmm (Thai), icu (any), auto
    (selected by language) or module:Class (custom); default: none. The named ones require
    megatron-prealign[segmenters]."""
    workers: int | None = None
    """Number of tokenising processes; default: one per available CPU core."""
    shard: str | None = None
    """Read only part I of N equal parts, as I/N; `megatron-prealign dataset merge` joins the outputs."""
    resume: bool = False
    """Resume an interrupted run with the same options; a complete dataset is left unchanged."""
    overwrite: bool = False
    """Overwrite an existing dataset."""
    engine: Literal["auto", "plain"] = "auto"
    """Encoder: auto uses gigatoken if it supports the tokenizer and produces the same ids on samples, otherwise the
    tokenizer's own library; plain always uses the latter."""
    max_document_mb: float = 16
    """Maximum size of a document in MiB; a larger one is an error, or skipped with --on-error skip."""
    save_every_mb: float = 256
    """MiB of text between two saves for --resume."""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after its name."""
    options = parse_options(PreprocessOptions, "preprocess", argv)

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
    _print(preprocess(options.input, options.tokenizer, options.output, settings))
    return 0


def _bytes(option: str, mebibytes: float) -> int:
    # The comparison also rejects NaN.
    if not 0 < mebibytes < _MOST_MEBIBYTES:
        raise UserError(f"--{option} is {mebibytes:g}, expected a number of MiB above 0")
    return max(int(mebibytes * (1 << 20)), 1)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
        raise UserError(f"--shard is {text!r}, expected I/N such as 1/8")
    return int(number), int(count)


def _print(result: "PreprocessResult") -> None:
    for prefix, sidecar in result.outputs.items():
        if not result.seconds:
            print(f"{prefix}: already complete for these inputs and options")
            continue
        bitmap = "" if sidecar.segmenter is None else f", .words (by {sidecar.segmenter})"
        print(f"wrote {prefix}.bin, .idx{bitmap} and .json")
        print(f"language         {sidecar.language}")
        print(f"documents        {sidecar.documents:,}")
        print(f"tokens           {sidecar.tokens:,} (including one end-of-document token per document)")
        print(f"text             {plural(sidecar.bytes, 'byte')}")
        print(f"encoded by       {sidecar.engine}")
    if result.text_bytes:
        print(f"speed            {result.text_bytes / result.seconds / 1e6:.2f} MB of text per second")
    # With a segmenter, white space does not separate words.
    if result.seconds and all(sidecar.segmenter is None for sidecar in result.outputs.values()):
        print(f"tokens per word  {result.tokens_per_word:.2f} (words split at white space, in a sample)")
    if not result.outputs:
        print("no documents in this shard; with --language-key no dataset is written (merge with --allow-missing)")
        return
    prefix, sidecar = next(iter(result.outputs.items()))
    print(f"skipped          {sidecar.skipped_count:,}")
    for problem in sidecar.skipped[:5]:
        # File names that are not UTF-8 cannot be printed unchanged.
        print(f"  {problem.where}: {problem.why}".encode(errors="backslashreplace").decode())
    if sidecar.skipped_count > 5:
        print(f"  ... the first {len(sidecar.skipped)} are listed in {prefix}.json")
    made = list(result.outputs.values())
    print(
        closing(
            f"{'wrote' if result.seconds else 'found'} {prefix if len(made) == 1 else plural(len(made), 'dataset')}: "
            f"{plural(sum(each.documents for each in made), 'document')}, "
            f"{plural(sum(each.tokens for each in made), 'token')} from "
            f"{readable_bytes(sum(each.bytes for each in made))} of text",
            *(command("dataset", "inspect", each) for each in result.outputs),
        )
    )
