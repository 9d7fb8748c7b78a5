"""Extracts English text from the docstrings of installed Python packages: a corpus that every machine has.

Writes train.jsonl and validation.jsonl (one {"text": ...} per line) and words.tsv, the dictionary from English to
English-Clone: the most frequent words of the training text, each translated to itself (the clone has the same spelling
with other token ids).
"""

import argparse
import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_all_atomically
from megatron_prealign.files.directories import writing
from megatron_prealign.progress import Progress
from megatron_prealign.resources import gc_disabled

STANDARD_LIBRARY = "stdlib"
# Packages that this one requires, so that the text does not depend on what else is installed; their versions are in
# constraints.txt. The standard library differs between Pythons.
PACKAGES = ("torch", "transformers", "megatron", "numpy", "matplotlib", "sympy", "networkx")
# Tests contain odd strings, vendored directories contain copies of other packages.
SKIPPED_DIRECTORIES = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "_vendor", "_vendored", "__pycache__"}
)
MIN_CHARACTERS = 80
MAX_SOURCE_BYTES = 2_000_000
VALIDATION_FRACTION = 0.02

WORD = re.compile(r"[^\W\d_]+")
FUNCTION_WORDS = frozenset(
    WORD.findall(
        "a about all also an and any are as at be been but by can do does each for from has have if in into is it its "
        "may more must no not of on one only or other over same should so such than that the their them then there "
        "these they this to use used was we what when where which while who will with would you your"
    )
)
ASCII_LETTERS = re.compile(r"[A-Za-z]+")
DOCTEST = re.compile(r"^\s*(>>>|\.\.\. |In \[\d+\]:|\$ )")
TABLE = re.compile(r"^\s*([-=~^+|*#`_.:\s]{3,}$|\|.*\|\s*$|\+[-=]{2,})")
DIRECTIVE = re.compile(r"^\s*\.\. [\w:-]+::|^\s*:[\w-]+:\s*$")
CODE_DIRECTIVE = re.compile(r"^\s*\.\. (code|sourcecode|plot|ipython|math|test|doctest|parsed-literal|\w*-?table|auto)")
FENCE = re.compile(r"^\s*(```|~~~)")
CODE_CHARACTER = re.compile(r"[_=<>\[\]{}\\/#@$%&~^|+0-9]")
BULLET = re.compile(r"^\s*([-*+•]|\d+[.)])\s+")
# :class:`~package.module.Name` is read as Name, `text <target>`_ as text
ROLE = re.compile(r":[\w:+.-]+:`~?(?:[\w.]*\.)?([^`<>]*?)(?:\s*<[^`]*>)?`")
LINK = re.compile(r"`([^`<>]+?)\s*<[^`]*>`_*")
MARKUP = re.compile(r"[`*|]+|(?<=\w)_(?=\W|$)")


@dataclass
class Harvest:
    """Extracted text, before the split."""

    documents: dict[bytes, str] = field(default_factory=dict)
    """Hash of the normalised text -> text."""
    paragraphs: set[bytes] = field(default_factory=set)
    """Hashes of the paragraphs kept so far."""
    text_bytes: int = 0
    files: int = 0
    unreadable: int = 0


def digest(text: str, seed: int | None = None) -> bytes:
    key = b"" if seed is None else seed.to_bytes(8, "little")
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16, key=key).digest()


def normalised(text: str) -> str:
    """Lower-case words with single spaces; ignores numbers, markup and line breaks, so that copies are recognised."""
    return " ".join(WORD.findall(text.lower()))


def is_english_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as English: mostly ASCII letters, function words among its words, little code."""
    words = WORD.findall(paragraph.lower())
    if len(words) < 4:
        return False
    solid = sum(map(len, paragraph.split()))
    if sum(map(len, ASCII_LETTERS.findall(paragraph))) < 0.75 * solid:
        return False
    return sum(word in FUNCTION_WORDS for word in words) >= 0.15 * len(words)


def without_code(text: str) -> str:
    """Removes doctests with their output, fenced and `::` blocks, tables, underlines and directives."""
    kept: list[str] = []
    fenced = in_doctest = False
    block_indent: int | None = None
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if FENCE.match(line):
            fenced = not fenced
            continue
        if fenced:
            continue
        if not line.strip():
            in_doctest = False
            kept.append("")
            continue
        if block_indent is not None and indent > block_indent:
            continue
        block_indent = None
        in_doctest = in_doctest or bool(DOCTEST.match(line))
        if in_doctest or TABLE.match(line):
            continue
        if DIRECTIVE.match(line):
            # the indented block below a code directive is code, below a note it is prose
            block_indent = indent if CODE_DIRECTIVE.match(line) else None
            continue
        if line.rstrip().endswith("::"):
            # the indented block that follows is code
            block_indent = indent
            line = line.rstrip()[:-1]
        kept.append(line.rstrip())
    return "\n".join(kept)


def plain(paragraph: str) -> str:
    """One line without bullets and inline markup, as on the rendered page."""
    text = " ".join(BULLET.sub("", line).strip() for line in paragraph.splitlines())
    text = MARKUP.sub("", LINK.sub(r"\1", ROLE.sub(r"\1", text)))
    return " ".join(text.split())


def clean(docstring: str, seen: set[bytes]) -> str:
    """Returns the English paragraphs of a docstring that are not in `seen`, and adds them to it; may be empty."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", without_code(inspect.cleandoc(docstring))):
        if not is_english_prose(paragraph):
            continue
        paragraph = plain(paragraph)
        if len(CODE_CHARACTER.findall(paragraph)) > 0.02 * len(paragraph):
            continue
        # documentation often repeats paragraphs; a repeated one could be in both splits
        mark = digest(normalised(paragraph))
        if mark not in seen:
            seen.add(mark)
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def docstrings(source: bytes, name: str) -> Iterator[str]:
    """Yields the docstrings of a module, its classes and functions, in order.

    Raises:
        SyntaxError, ValueError, RecursionError: the source is not valid for this Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(source, filename=name)
    # only statements contain definitions; expressions, most of the tree, are not visited
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) > MIN_CHARACTERS:
                yield text
        for block in ("handlers", "finalbody", "orelse", "body"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                pending += reversed(statements)


def python_files(packages: Sequence[str]) -> list[tuple[str, Path]]:
    """Returns (name, path) of the packages' sources, sorted by name; names do not depend on the machine.

    Raises:
        UserError: a package is not installed.
    """
    found: dict[str, Path] = {}
    for package in packages:
        directories = package_directories(package)
        if not directories:
            raise UserError(f"package {package} is not installed; install it or list other packages with --packages")
        for root in directories:
            for path in root.rglob("*.py"):
                parts = path.relative_to(root).parts
                if SKIPPED_DIRECTORIES.isdisjoint(parts):
                    found.setdefault(f"{package}/{'/'.join(parts)}", path)
    return sorted(found.items())


def package_directories(package: str) -> list[Path]:
    """Returns the directories of a package without importing it; empty if it is not installed."""
    if package == STANDARD_LIBRARY:
        return [Path(sysconfig.get_paths()["stdlib"])]
    specification = importlib.util.find_spec(package)
    return [Path(directory) for directory in (specification.submodule_search_locations or [])] if specification else []


def sources(packages: Sequence[str], seed: int) -> list[tuple[str, Path | None]]:
    """Returns all sources in a seeded order; another package does not change the order of the rest.

    The path of pydoc's topics is None.
    """
    names: list[tuple[str, Path | None]] = [*python_files(packages)]
    if STANDARD_LIBRARY in packages:
        names.append(("pydoc_data.topics", None))
    return sorted(names, key=lambda item: digest(item[0], seed))


def texts_of(name: str, path: Path | None) -> list[str]:
    if path is None:
        from pydoc_data.topics import topics

        return [topics[topic] for topic in sorted(topics)]
    if path.stat().st_size > MAX_SOURCE_BYTES:
        return []
    source = path.read_bytes()
    # parsing dominates the time; most files of some packages have no long string
    if b'"""' not in source and b"'''" not in source:
        return []
    return list(docstrings(source, name))


def gather(packages: Sequence[str], max_bytes: int, seed: int) -> Harvest:
    """Reads sources until they yield `max_bytes` of text or end."""
    harvest = Harvest()
    with gc_disabled(), Progress("harvest", total=max_bytes, unit="B", unit_scale=True) as progress:
        for name, path in sources(packages, seed):
            try:
                texts = texts_of(name, path)
            except (SyntaxError, ValueError, RecursionError, OSError):
                harvest.unreadable += 1
                continue
            harvest.files += 1
            for docstring in texts:
                text = clean(docstring, harvest.paragraphs)
                mark = digest(normalised(text))
                if len(text) <= MIN_CHARACTERS or mark in harvest.documents:
                    continue
                size = len(text.encode("utf-8", "replace"))
                if harvest.text_bytes + size > max_bytes:
                    return harvest
                harvest.documents[mark] = text
                harvest.text_bytes += size
                progress.update(size)
    return harvest


def split(documents: dict[bytes, str], seed: int) -> tuple[list[str], list[str]]:
    """Training and validation texts in seeded order.

    The split of a document depends only on its own normalised text, so it stays the same when the corpus grows.
    """
    train: list[str] = []
    validation: list[str] = []
    order = sorted(documents, key=lambda mark: digest(mark.hex(), seed))
    for mark in order:
        side = validation if int.from_bytes(mark[:8], "little") < VALIDATION_FRACTION * 2**64 else train
        side.append(documents[mark])
    return train, validation


def frequent_words(texts: Iterable[str], count: int) -> list[str]:
    """Returns the `count` most frequent words, split at spaces, with case and punctuation.

    The clone translates every English token except one, so any word of the text can be in its dictionary.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text.split())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, _ in ordered if WORD.search(word)][:count]


def write(output: Path, train: Sequence[str], validation: Sequence[str], words: Sequence[str]) -> None:
    targets = [output / "train.jsonl", output / "validation.jsonl", output / "words.tsv"]
    with writing(targets[0], "corpus"), write_all_atomically(targets) as (train_path, validation_path, words_path):
        for path, texts in ((train_path, train), (validation_path, validation)):
            with path.open("w", encoding="utf-8") as file:
                # escaped to ASCII: a lone surrogate in a docstring cannot be written as UTF-8
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        words_path.write_text("".join(f"{word}\t{word}\n" for word in words), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="directory of the three files; created if it does not exist"
    )
    parser.add_argument(
        "--max-bytes", type=int, default=12_000_000, help="size of the text to extract (default: %(default)s)"
    )
    parser.add_argument("--words", type=int, default=8_000, help="number of words in words.tsv (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the order of files and documents (default: %(default)s)"
    )
    parser.add_argument(
        "--packages",
        nargs="+",
        default=list(PACKAGES),
        metavar="NAME",
        help=f"packages to read; stdlib is the standard library (default: {' '.join(PACKAGES)})",
    )
    options = parser.parse_args(argv)
    for name, minimum in (("max_bytes", 1), ("words", 1), ("seed", 0)):
        if getattr(options, name) < minimum:
            parser.error(f"--{name.replace('_', '-')} must be at least {minimum}, got {getattr(options, name)}")
    try:
        report(options, time.monotonic())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def report(options: argparse.Namespace, start_s: float) -> None:
    """Extracts, splits and writes the text; prints a summary."""
    harvest = gather(options.packages, options.max_bytes, options.seed)
    train, validation = split(harvest.documents, options.seed)
    if not train or not validation:
        raise UserError(
            f"{', '.join(options.packages)}: found {len(harvest.documents)} documents, too few for two splits; "
            "list larger installed packages with --packages or increase --max-bytes"
        )
    words = frequent_words(train, options.words)
    write(options.output, train, validation, words)
    print(
        f"{options.output}: {len(train):,} training and {len(validation):,} validation documents, "
        f"{harvest.text_bytes / 1e6:.1f} MB from {harvest.files:,} files ({harvest.unreadable} unreadable), "
        f"{len(words):,} words, in {time.monotonic() - start_s:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
