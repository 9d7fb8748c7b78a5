"""`megatron-prealign dataset`: joins, shows, checks and mends preprocessed datasets, and prepares training's caches."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import LanguageText, PathText, PrefixText
from megatron_prealign.resources import available_cores


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Joins datasets of one tokenizer into one: the shards of a preprocess run, or datasets made one by one.

    The bytes are those of Megatron-LM's own merge, and for shards those of the run without --shard.
    """

    input: list[PrefixText]
    """Prefixes of the datasets, or their .bin files, in the order of their documents; shards in any order."""
    output: PrefixText
    """PREFIX: path of the files to write, without the ending."""
    workers: int | None = None
    """Threads that copy; by default one for each CPU core this process may use."""
    language: LanguageText | None = None
    """Language code of the result, for datasets of different languages."""
    drop_words: bool = False
    """Leave PREFIX.words out, for datasets of which only some were made with a segmenter."""
    allow_missing: bool = False
    """Take missing shards for empty ones: with --language-key, preprocess writes no files for a language that a shard
    has no document of."""
    without_sidecar: bool = False
    """Join .bin and .idx alone, for files of Megatron-LM's own tools; no .json is read or written."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Shows what is in a dataset: counts, lengths of the documents, frequent tokens, samples of the text.

    Lengths are those of all documents, tokens are sampled; memory does not depend on the size.
    """

    input: PrefixText
    """Prefix of the dataset, or its .bin file."""
    tokenizer: PathText | None = None
    """Tokenizer that decodes; by default the one that PREFIX.json names, if it is still there."""
    samples: int = 3
    """Documents to show, spread evenly from the first on."""
    json: bool = False
    """Print one JSON object instead."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Reads datasets whole and lists everything that cannot be right; exit status 2 if anything is wrong.

    Looked at are header, sizes and sums, ids, ends of documents, checksums, marks of words, the counts of PREFIX.json.
    """

    input: list[PrefixText]
    """Prefixes of the datasets, or their .bin files."""
    tokenizer: PathText | None = None
    """Also compare with this tokenizer."""
    workers: int | None = None
    """Threads that read; by default one for each CPU core this process may use."""


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """Makes PREFIX.idx and the counts and checksums in PREFIX.json again from PREFIX.bin.

    Every document must end with the end-of-document id. Also gives token files of other tools a PREFIX.json. Older
    files are kept as .bak.
    """

    input: PrefixText
    """Prefix of the dataset, or its .bin file."""
    tokenizer: PathText | None = None
    """Tokenizer that made the ids, if there is no PREFIX.json."""
    language: LanguageText | None = None
    """Language code of the documents, if there is no PREFIX.json."""
    dtype: Literal["auto", "uint16", "int32"] = "auto"
    """How the tokens are stored; auto: as the old index says, or else as the vocabulary needs it."""
    cut_tail: bool = False
    """Move what lies behind the last whole document into PREFIX.bin.tail."""
    drop_words: bool = False
    """Go on without the marks of words (PREFIX.words)."""
    force: bool = False
    """Write also if all is well, or if the tokens have changed since their checksum was taken."""
    workers: int | None = None
    """Threads that check; by default one for each CPU core this process may use."""


@dataclass(frozen=True, kw_only=True)
class PrepareCacheOptions:
    """Builds the sample index that training with the recipe will look for, without a GPU."""


def merge(argv: Sequence[str]) -> int:
    options = parse_options(MergeOptions, "dataset merge", argv)

    from megatron_prealign.data.commands.merge import merge as merge_datasets

    result = merge_datasets(
        _prefixes(options.input),
        options.output,
        workers=_workers(options.workers),
        language=options.language,
        drop_words=options.drop_words,
        allow_missing=options.allow_missing,
        without_sidecar=options.without_sidecar,
    )
    facts = result.sidecar
    endings = [".bin", ".idx"]
    if facts is not None:
        endings += [".json"] if facts.segmenter is None else [f".words (by {facts.segmenter})", ".json"]
    print(f"wrote {options.output}{', '.join(endings[:-1])} and {endings[-1]}")
    print(f"parts      {len(result.parts):,}: {', '.join(result.parts[:8])}{', ...' if len(result.parts) > 8 else ''}")
    print(f"documents  {result.documents:,}")
    print(f"tokens     {result.tokens:,}")
    print(f"copied     {result.bytes:,} bytes, {result.bytes / result.seconds / 1e6:,.0f} MB/s")
    return 0


def inspect(argv: Sequence[str]) -> int:
    options = parse_options(InspectOptions, "dataset inspect", argv, positional="input")
    if options.samples < 0:
        raise UserError(f"--samples is {options.samples}, expected a number from 0")

    from megatron_prealign.data.commands.inspect import inspect_dataset, render

    found = inspect_dataset(_prefixes([options.input])[0], tokenizer=options.tokenizer, samples=options.samples)
    if options.json:
        import json

        print(json.dumps(asdict(found), ensure_ascii=False, indent=2))
    else:
        print("\n".join(render(found)))
    return 0


def verify(argv: Sequence[str]) -> int:
    options = parse_options(VerifyOptions, "dataset verify", argv, positional="input")
    if not options.input:
        raise UserError("--input is empty; expected the prefixes of datasets")

    from megatron_prealign.data.commands.verify import verify as verify_dataset

    wrong = 0
    for prefix in _prefixes(options.input):
        result = verify_dataset(prefix, workers=_workers(options.workers), tokenizer=options.tokenizer)
        for problem in result.problems:
            print(f"wrong: {problem}")
        print(f"{prefix}: {len(result.problems) or 'nothing'} wrong; checked {', '.join(result.checked) or 'nothing'}")
        wrong += bool(result.problems)
    if wrong:
        raise UserError(
            f"{wrong} of {len(options.input)} datasets {'is' if wrong == 1 else 'are'} wrong, as listed above"
        )
    return 0


def repair(argv: Sequence[str]) -> int:
    options = parse_options(RepairOptions, "dataset repair", argv, positional="input")

    from megatron_prealign.data.commands.repair import repair as repair_dataset

    (prefix,) = _prefixes([options.input])
    done = repair_dataset(
        prefix,
        tokenizer=options.tokenizer,
        language=options.language,
        dtype=options.dtype,
        cut_tail=options.cut_tail,
        drop_words=options.drop_words,
        force=options.force,
        workers=_workers(options.workers),
    )
    if not done.changed:
        print(f"{prefix}: nothing to repair; --force writes the index all the same")
        return 0
    facts = done.sidecar
    print(f"wrote {prefix}.idx and .json: {facts.documents:,} documents, {facts.tokens:,} tokens")
    for path in done.kept:
        print(f"kept {path}")
    return 0


def prepare_cache(argv: Sequence[str]) -> int:
    from megatron_prealign.cli.recipe_options import parse_recipe

    recipe, _ = parse_recipe("dataset prepare-cache", PrepareCacheOptions, argv)

    from megatron_prealign.runtime import log

    log.configure()
    from megatron_prealign.run.prepare_cache import prepare_cache as prepare

    done = prepare(recipe)
    print(f"{'wrote' if done.built else 'already there:'} {done.directory}")
    print(f"samples  {done.samples:,} of {recipe.data.seq_length:,} tokens")
    print(f"index    {done.bytes:,} bytes")
    if recipe.data.cache is None:
        print("data.cache is not set: only runs with this logging.run_dir look there")
    return 0


def _prefixes(given: Sequence[str]) -> list[str]:
    """Takes the .bin files of datasets for the datasets, so that a pattern of the shell can name them."""
    return [name.removesuffix(".bin") if os.path.isfile(name) else name for name in given]


def _workers(given: int | None) -> int:
    return available_cores() if given is None else given


ACTIONS: Actions = {
    "merge": (merge, "join shards or datasets into one"),
    "inspect": (inspect, "counts, lengths of documents, frequent tokens, decoded samples"),
    "verify": (verify, "read everything and list what is wrong"),
    "repair": (repair, "make the index and the counts again from the tokens"),
    "prepare-cache": (prepare_cache, "make the sample index of a recipe before training does"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `dataset ACTION`."""
    return run_action("dataset", ACTIONS, argv)
