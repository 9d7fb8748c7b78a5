"""Data of the study with 148 M parameters: English text of yours as English and as English-Clone.

Every step is a command a user would type; it is printed before it runs. Steps whose output exists are skipped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prealign.corpus.inputs import resolve_inputs
from megatron_prealign.corpus.readers import read_documents
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.files.directories import writing

sys.path.append(str(Path(__file__).parents[1] / "english_clone"))

from harvest import frequent_words
from run import megatron_prealign, run

DATA = Path("runs/english_clone_150m/data")
TABLE, CONTROL = DATA / "table.safetensors", DATA / "shuffled.safetensors"


def write_words(inputs: Sequence[str], output: Path, count: int) -> None:
    """Writes the most frequent words of the text, each translated to itself, unless `output` exists.

    Raises:
        UserError: An input cannot be read or has no words.
    """
    if output.exists():
        print(f"# {output} exists", flush=True)
        return
    print(f"# counting the words of {', '.join(inputs)}", flush=True)
    words = frequent_words((text for text, _ in read_documents(resolve_inputs(inputs))), count)
    if not words:
        raise UserError(f"{', '.join(inputs)}: no words, expected English text")
    with writing(output, "word list"), write_atomically(output) as path:
        path.write_text("".join(f"{word}\t{word}\n" for word in words), encoding="utf-8")


def prepare(inputs: Sequence[str], vocabulary: int, words: int, workers: int | None) -> None:
    """Word list, tokenizer, both languages, dictionary and its control.

    Args:
        inputs: Text, in any form that `preprocess` takes.
        vocabulary: Ids of each language.
        words: Words of the dictionary.
        workers: Of `preprocess`; None for its default.
    """
    DATA.mkdir(parents=True, exist_ok=True)
    word_list, tokenizer = DATA / "words.tsv", DATA / "tokenizer"
    write_words(inputs, word_list, words)
    options = ("--vocab-size", vocabulary, "--clone-language", "en_clone")
    run(megatron_prealign("train-tokenizer", "--input", *inputs, "--output", tokenizer, *options), tokenizer)
    for language in ("en", "en_clone"):
        options = ("--output", DATA / language, "--language", language, *(("--workers", workers) if workers else ()))
        command = megatron_prealign("preprocess", "--input", *inputs, "--tokenizer", tokenizer, *options)
        run(command, DATA / f"{language}.json")
    # The list has the words as they are in the text, brackets included.
    options = ("--tokenizer", tokenizer, "--output", TABLE, "--corpus", DATA / "en", "--notes", "keep")
    run(megatron_prealign("dictionary", "build", "--input", f"{word_list}:en-en_clone", *options), TABLE)
    run(megatron_prealign("dictionary", "shuffle", "--table", TABLE, "--output", CONTROL), CONTROL)


def main() -> int:
    """Prepares the data in the current directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="English text: files, directories or globs, as preprocess --input takes",
    )
    parser.add_argument("--vocab-size", type=int, default=20480, help="ids of each language (default: %(default)s)")
    parser.add_argument("--words", type=int, default=40_000, help="words of the dictionary (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes of preprocess (default: one per core)")
    options = parser.parse_args()
    for name in ("vocab_size", "words", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    try:
        prepare(options.inputs, options.vocab_size, options.words, options.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
