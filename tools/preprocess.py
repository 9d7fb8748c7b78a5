"""`megatron-prealign preprocess`: text files to .bin/.idx token files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_prealign.cli import parse_options


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Turns text files into PREFIX.bin, PREFIX.idx (Megatron-Core's format) and PREFIX.json (what they hold). With a
    segmenter also PREFIX.words, one bit a token: does a word start here?"""

    input: list[str]
    """Files to read, one or more: .jsonl (one object a line) or .txt (documents separated by blank lines), also .gz."""
    tokenizer: str
    """Hugging Face tokenizer folder or sentencepiece .model file."""
    output: str
    """PREFIX: path of the files to write, without the ending."""
    language: str
    """Language code of the documents, as in the dictionary (en, de, ...)."""
    text_key: str = "text"
    """Key of the text in each JSON object."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a bad document or a damaged file; skipped ones are listed in PREFIX.json."""
    segmenter: str | None = None
    """Who finds the words of a script without spaces: jieba (Chinese), sudachi (Japanese), newmm (Thai), icu (any), all
    from the extra megatron-prealign[segmenters], or module:Class for one of your own; by default nobody."""
    workers: int | None = None
    """Processes that tokenise; by default one for each CPU core this process may use."""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments behind its name."""
    options = parse_options(PreprocessOptions, "preprocess", argv)

    import os

    from megatron_prealign.data.preprocess import preprocess

    workers = options.workers
    if workers is None:
        # A container's share is often less than the machine's cores; macOS cannot tell.
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    result = preprocess(
        options.input,
        options.tokenizer,
        options.output,
        options.language,
        options.text_key,
        options.on_error,
        workers,
        segmenter=options.segmenter,
    )
    facts = result.sidecar
    bitmap = "" if facts.segmenter is None else f", .words (by {facts.segmenter})"
    print(f"wrote {options.output}.bin, .idx{bitmap} and .json")
    print(f"documents        {facts.documents:,}")
    print(f"tokens           {facts.tokens:,} (with one end-of-document token each)")
    print(f"text             {facts.bytes:,} bytes, {facts.bytes / result.seconds / 1e6:.2f} MB/s")
    print(f"tokens per word  {(facts.tokens - facts.documents) / max(result.words, 1):.2f} (words between white space)")
    print(f"skipped          {facts.skipped_count:,}")
    for problem in facts.skipped[:5]:
        print(f"  {problem.where}: {problem.why}")
    if facts.skipped_count > 5:
        print(f"  ... the first {len(facts.skipped)} are listed in {options.output}.json")
    return 0
