"""`megatron-prealign dictionary induce`: makes a word list from parallel text."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import PathText
from megatron_prealign.text import closing, command, plural

if TYPE_CHECKING:
    from megatron_prealign.dictionary.bitext import Bitext
    from megatron_prealign.dictionary.induce import Induced
    from megatron_prealign.dictionary.readers import DictionaryInput, ReadErrors


@dataclass(frozen=True, kw_only=True)
class InduceOptions:
    """Makes a word list from translated sentences, for `dictionary build`.

    Pairs are found with IBM model 1 in both directions. Words are counted in any case and written as they occur.
    """

    bitext: list[PathText]
    """One or more files of parallel text as FILE:SOURCE-TARGET (text.tsv.gz:en-de), one SOURCE<TAB>TARGET per line.

    All have the same two languages; the order of the first is that of the list. Files may be compressed with gzip,
    zstd or bzip2.
    """
    output: PathText
    """TSV file to write: source word, target word, weight. An existing list of this command is overwritten, other
    files are not."""
    min_count: int = 3
    """Minimum number of occurrences of a pair that the model expects, in the direction with fewer."""
    min_probability: float = 0.05
    """Minimum of the product of the translation probabilities of both directions, above 0 and at most 1."""
    iterations: int = 8
    """Number of iterations of expectation-maximisation."""
    max_words: int = 100
    """Maximum length of a sentence in words; longer ones are skipped."""
    segmenter: list[str] = field(default_factory=list)
    """Segmenters of languages without spaces: LANGUAGE=NAME for each language, or auto.

    NAME is a segmenter as in preprocess (jieba, sudachi, newmm, icu, module:Class).
    """
    on_error: Literal["stop", "skip"] = "stop"
    """What to do at a malformed line: stop, or skip it and list the first 100."""


def induce(argv: Sequence[str]) -> int:
    """Runs `dictionary induce`."""
    options = parse_options(InduceOptions, "dictionary induce", argv)

    from megatron_prealign.dictionary.bitext import bitext_languages, choose_segmenters, read_bitext
    from megatron_prealign.dictionary.induce import InduceSettings, write_list
    from megatron_prealign.dictionary.induce import induce as make_list
    from megatron_prealign.dictionary.readers import ReadErrors, parse_bitext
    from megatron_prealign.files.atomic import write_atomically
    from megatron_prealign.files.directories import writing

    settings = InduceSettings(
        min_count=options.min_count, min_probability=options.min_probability, iterations=options.iterations
    )
    if options.max_words < 1:
        raise UserError(f"--max-words is {options.max_words}, expected an integer of 1 or more")
    if not options.bitext:
        raise UserError("--bitext is empty, expected one or more files as FILE:SOURCE-TARGET")
    inputs = [parse_bitext(text) for text in options.bitext]
    segmenters = choose_segmenters(options.segmenter, bitext_languages(inputs))
    output = Path(options.output)
    _check_output(output, inputs)
    errors = ReadErrors()
    bitext = read_bitext(
        inputs, segmenters, errors, max_words=options.max_words, on_error=options.on_error, show_progress=True
    )
    with writing(output, "word list"):
        induced = make_list(bitext, settings, output.parent, show_progress=True)
        with write_atomically(output) as temporary:
            write_list(temporary, bitext.languages, induced.pairs)
    _print_report(options, bitext, errors, induced)
    listed = f"{options.output}:{'-'.join(bitext.languages)}"
    build = ("--weights", "--tokenizer", "TOKENIZER", "--output", "table.safetensors")
    print(
        closing(
            f"wrote {options.output}: {plural(len(induced.pairs), 'pair')} of written forms",
            command("dictionary", "build", "--input", listed, *build),
        )
    )
    return 0


def _check_output(output: Path, inputs: "Sequence[DictionaryInput]") -> None:
    """Checks that the list can be written without overwriting anything but an existing list.

    Raises:
        UserError: it cannot.
    """
    from megatron_prealign.dictionary.bitext import bitext_languages
    from megatron_prealign.dictionary.formats.header import WEIGHT
    from megatron_prealign.files.directories import check_writable

    if os.path.realpath(output) in [os.path.realpath(each.path) for each in inputs]:
        raise UserError(f"--output {output} would overwrite an input; choose another path")
    if os.path.lexists(output):
        start = b""
        if output.is_file():
            with output.open("rb") as file:
                start = file.readline(200)
        cells = start.decode("utf-8", "replace").rstrip("\n").split("\t")
        if cells != [*bitext_languages(inputs), WEIGHT]:
            raise UserError(
                f"--output {output}: exists and is no list of these languages by dictionary induce; choose another "
                "path, or remove it"
            )
    check_writable(output.parent, f"--output {output}")


def _print_report(options: InduceOptions, bitext: "Bitext", errors: "ReadErrors", induced: "Induced") -> None:
    for line in errors.first:
        print(f"skipped {line}")
    if errors.count > len(errors.first):
        print(f"skipped {plural(errors.count - len(errors.first), 'more line')}")
    print(f"{bitext.pairs:>12,}  sentence pairs used")
    skipped = {
        "lines": errors.count,
        "sentence pairs with a side without words": bitext.empty,
        f"sentence pairs with more than {options.max_words} words on a side": bitext.too_long,
    }
    if any(skipped.values()):
        print("skipped:")
    for name, count in skipped.items():
        if count:
            print(f"{count:>12,}  {name}")
    for language, words in zip(bitext.languages, induced.words, strict=True):
        running, frequent = int(words.count.sum()), int((words.count >= options.min_count).sum())
        print(
            f"{language}: {plural(running, 'running word')}, {plural(len(words.count), 'distinct word')}, "
            f"{frequent:,} with {options.min_count} or more occurrences"
        )
    print(f"kept {plural(induced.num_translations, 'pair')} of words")
    for language, covered in zip(bitext.languages, induced.covered, strict=True):
        print(f"{covered:>7.1%}  of the running words of {language} are in a pair")
