"""`megatron-prealign dataset`: merges, inspects, verifies and repairs datasets, and builds sample index caches."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_prealign.cli.actions import Actions, run_action
from megatron_prealign.cli.options import parse_options
from megatron_prealign.errors import UserError
from megatron_prealign.recipe.describe import LanguageText, PathText, PrefixText
from megatron_prealign.resources import available_cores
from megatron_prealign.text import closing, command, next_line, plural


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Merges datasets of the same tokenizer: the shards of a preprocess run, or separately made datasets.

    The output is byte-identical to Megatron-LM's own merge and, for shards, to the run without --shard.
    """

    input: list[PrefixText]
    """Prefixes or .bin files of the datasets, in document order; shards in any order."""
    output: PrefixText
    """Path of the output files, without extension."""
    workers: int | None = None
    """Number of copy threads; default: available CPU cores."""
    language: LanguageText | None = None
    """Language code of the merged dataset, for datasets with different languages."""
    drop_words: bool = False
    """Omit PREFIX.words, for datasets of which only some were made with a segmenter."""
    allow_missing: bool = False
    """Treat missing shards as empty: with --language-key, preprocess writes no files for a language without documents
    in a shard."""
    without_sidecar: bool = False
    """Merge only .bin and .idx, for files of Megatron-LM's own tools; no .json is read or written."""


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Summarises a dataset: counts, document lengths, frequent tokens and sample documents.

    Lengths cover all documents, tokens are sampled; memory does not depend on the size.
    """

    input: PrefixText
    """Prefix or .bin file of the dataset."""
    tokenizer: PathText | None = None
    """Tokenizer for decoding; default: the one named in PREFIX.json, if it still exists."""
    samples: int = 3
    """Number of documents to show, evenly spaced from the first on."""
    json: bool = False
    """Print a JSON object instead of text."""


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Reads datasets completely and lists all problems; exit status 1 if there are any.

    Checks headers, sizes, ids, document ends, checksums, word bitmaps and the counts in PREFIX.json.
    """

    input: list[PrefixText]
    """Prefixes or .bin files of the datasets."""
    tokenizer: PathText | None = None
    """Tokenizer whose fingerprint, vocabulary size and end-of-document id PREFIX.json must match."""
    workers: int | None = None
    """Number of reader threads; default: available CPU cores."""


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """Rebuilds PREFIX.idx and the counts and checksums in PREFIX.json from PREFIX.bin.

    Every document must end with the end-of-document id. Also creates PREFIX.json for token files of other tools.
    Replaced files are kept as .bak.
    """

    input: PrefixText
    """Prefix or .bin file of the dataset."""
    tokenizer: PathText | None = None
    """Tokenizer that produced the ids, if PREFIX.json does not exist."""
    language: LanguageText | None = None
    """Language code of the documents, if PREFIX.json does not exist."""
    dtype: Literal["auto", "uint16", "int32"] = "auto"
    """Token dtype; auto: that of the old index, else the one that fits the file size or the vocabulary."""
    cut_tail: bool = False
    """Move bytes after the last complete document to PREFIX.bin.tail."""
    drop_words: bool = False
    """Drop the word bitmap (PREFIX.words)."""
    force: bool = False
    """Rewrite even if there is nothing to repair, or if the tokens do not match their checksum."""
    workers: int | None = None
    """Number of verification threads; default: available CPU cores."""


@dataclass(frozen=True, kw_only=True)
class PrepareCacheOptions:
    """Builds the sample index that training with the recipe uses, without a GPU."""


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
    sidecar = result.sidecar
    extensions = [".bin", ".idx"]
    if sidecar is not None:
        extensions += [".json"] if sidecar.segmenter is None else [f".words (by {sidecar.segmenter})", ".json"]
    print(f"wrote {options.output}{', '.join(extensions[:-1])} and {extensions[-1]}")
    print(f"inputs     {len(result.parts):,}: {', '.join(result.parts[:8])}{', ...' if len(result.parts) > 8 else ''}")
    print(f"documents  {result.documents:,}")
    print(f"tokens     {result.tokens:,}")
    print(f"copied     {result.bytes:,} bytes, {result.bytes / result.seconds / 1e6:,.0f} MB/s")
    print(
        closing(
            f"merged {plural(len(result.parts), 'dataset')} into {options.output}: "
            f"{plural(result.documents, 'document')}, {plural(result.tokens, 'token')}",
            command("dataset", "inspect" if sidecar is None else "verify", options.output),
        )
    )
    return 0


def inspect(argv: Sequence[str]) -> int:
    options = parse_options(InspectOptions, "dataset inspect", argv, positional="input")
    if options.samples < 0:
        raise UserError(f"--samples is {options.samples}, expected at least 0")

    from megatron_prealign.data.commands.inspect import inspect_dataset, render

    (prefix,) = _prefixes([options.input])
    inspection = inspect_dataset(prefix, tokenizer=options.tokenizer, samples=options.samples)
    if options.json:
        import json

        print(json.dumps(asdict(inspection), ensure_ascii=False, indent=2))
    else:
        print("\n".join(render(inspection)))
        print(next_line(command("dataset", "verify", prefix)))
    return 0


def verify(argv: Sequence[str]) -> int:
    options = parse_options(VerifyOptions, "dataset verify", argv, positional="input")
    if not options.input:
        raise UserError("--input is empty, expected at least one dataset prefix")

    from megatron_prealign.data.commands.verify import verify as verify_dataset

    prefixes, failed = _prefixes(options.input), []
    for prefix in prefixes:
        result = verify_dataset(prefix, workers=_workers(options.workers), tokenizer=options.tokenizer)
        for problem in result.problems:
            print(f"problem: {problem}")
        count = plural(len(result.problems), "problem") if result.problems else "no problems"
        print(f"{prefix}: {count}; checked {', '.join(result.checked) or 'nothing'}")
        failed += [prefix] if result.problems else []
    if failed:
        made = f"problems in {len(failed)} of {plural(len(prefixes), 'dataset')}"
        print(closing(made, *(command("dataset", "repair", prefix) for prefix in failed)))
        return 1
    made = f"verified {plural(len(prefixes), 'dataset')} without problems"
    print(closing(made, *(command("dataset", "inspect", prefix) for prefix in prefixes)))
    return 0


def repair(argv: Sequence[str]) -> int:
    options = parse_options(RepairOptions, "dataset repair", argv, positional="input")

    from megatron_prealign.data.commands.repair import repair as repair_dataset

    (prefix,) = _prefixes([options.input])
    result = repair_dataset(
        prefix,
        tokenizer=options.tokenizer,
        language=options.language,
        dtype=options.dtype,
        cut_tail=options.cut_tail,
        drop_words=options.drop_words,
        force=options.force,
        workers=_workers(options.workers),
    )
    if not result.changed:
        print(f"{prefix}: nothing to repair; use --force to rewrite the index anyway")
        print(next_line(command("dataset", "inspect", prefix)))
        return 0
    sidecar = result.sidecar
    for path in result.backups:
        print(f"backup {path}")
    print(
        closing(
            f"wrote {prefix}.idx and .json: {plural(sidecar.documents, 'document')}, {plural(sidecar.tokens, 'token')}",
            command("dataset", "verify", prefix),
        )
    )
    return 0


def prepare_cache(argv: Sequence[str]) -> int:
    from megatron_prealign.cli.recipe_options import parse_recipe

    recipe, _ = parse_recipe("dataset prepare-cache", PrepareCacheOptions, argv)

    from megatron_prealign.runtime import log

    log.configure()
    from megatron_prealign.run.prepare_cache import prepare_cache as prepare

    done = prepare(recipe)
    if recipe.data.cache is None:
        print("data.cache is not set: only runs with this logging.run_dir will use it")
    print(
        closing(
            f"{'wrote' if done.built else 'already exists:'} {done.directory}: {plural(done.samples, 'sample')} of "
            f"{recipe.data.seq_length:,} tokens, index of {done.bytes:,} bytes",
            command("pretrain", *argv),
        )
    )
    return 0


def _prefixes(names: Sequence[str]) -> list[str]:
    """Converts paths of .bin files to prefixes, so that shell patterns can select datasets."""
    return [name.removesuffix(".bin") if os.path.isfile(name) else name for name in names]


def _workers(requested: int | None) -> int:
    return available_cores() if requested is None else requested


ACTIONS: Actions = {
    "merge": (merge, "merge shards or datasets into one"),
    "inspect": (inspect, "show counts, document lengths, frequent tokens and decoded samples"),
    "verify": (verify, "read everything and list all problems"),
    "repair": (repair, "rebuild the index and the counts from the tokens"),
    "prepare-cache": (prepare_cache, "build the sample index of a recipe before training"),
}


def main(argv: Sequence[str]) -> int:
    """Runs `dataset ACTION`."""
    return run_action("dataset", ACTIONS, argv)
