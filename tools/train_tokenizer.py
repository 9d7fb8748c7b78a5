"""`megatron-prealign train-tokenizer`: a byte-level BPE tokenizer out of text files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_prealign.cli import parse_options


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerOptions:
    """Trains a byte-level BPE tokenizer and writes it as a Hugging Face tokenizer folder."""

    input: list[str]
    """Files to read, one or more: .jsonl (one object a line) or .txt (documents separated by blank lines), also .gz."""
    output: str
    """Folder to write; it must not exist yet."""
    vocab_size: int
    """Tokens in the vocabulary, <eod> and the 256 bytes included."""
    clone_language: str | None = None
    """Makes it a clone tokenizer with twice the ids, the upper half for this language code (English-Clone study)."""
    text_key: str = "text"
    """Key of the text in each JSON object."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a bad document or a damaged file."""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments behind its name."""
    options = parse_options(TrainTokenizerOptions, "train-tokenizer", argv)

    from megatron_prealign.data.tokenizer import load_tokenizer
    from megatron_prealign.data.train_tokenizer import train_tokenizer

    problems = train_tokenizer(
        options.input, options.output, options.vocab_size, options.clone_language, options.text_key, options.on_error
    )
    tokenizer = load_tokenizer(options.output)
    print(f"wrote {options.output}: {tokenizer.vocab_size:,} ids, end of document {tokenizer.eod_id}")
    print(f"skipped {problems.count:,}")
    for problem in problems.listed[:5]:
        print(f"  {problem.where}: {problem.why}")
    return 0
