"""Text files to .bin/.idx token files: blocks of documents are tokenised by worker processes and written in order."""

import glob
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_prealign.corpus.blocks import Block, Extent, extents, read_blocks
from megatron_prealign.corpus.inputs import Input, resolve_inputs
from megatron_prealign.corpus.readers import EMPTY, Places, ReadError, unit_of
from megatron_prealign.data.dataset import check_output_prefix
from megatron_prealign.data.indexed import bin_path, idx_path, token_dtype
from megatron_prealign.data.sidecar import (
    InputRecord,
    Sidecar,
    TokenizerRecord,
    load_sidecar,
    sidecar_path,
    write_sidecar,
)
from megatron_prealign.data.word_bitmap import words_path
from megatron_prealign.errors import DISK_ERRORS, UserError, write_error
from megatron_prealign.files.sync import sync_file
from megatron_prealign.preprocess.journal import (
    TokenWriter,
    Unfinished,
    UnusableRunError,
    has_unfinished,
    open_unfinished,
)
from megatron_prealign.preprocess.settings import PreprocessSettings as PreprocessSettings
from megatron_prealign.preprocess.settings import check_settings, check_shard, shard_text
from megatron_prealign.preprocess.tokenise import BlockTokeniser, Route, TokenisedBlock, TokeniserSettings
from megatron_prealign.preprocess.worker_pool import EngineChoice, tokenise_in_order
from megatron_prealign.progress import Progress
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.tokenizer.segmenters import resolve_segmenter

# Beyond it a language field holds something else than languages, and every value opens three files.
_MOST_DATASETS = 500


@dataclass(frozen=True)
class PreprocessResult:
    """What one run of `preprocess` did."""

    outputs: dict[str, Sidecar]
    """Prefix -> what was written there; one, unless several keys or a language key were given."""
    tokens_per_word: float
    """In a sample of the documents; words stand between white space."""
    seconds: float
    """Time for reading, tokenising and writing, the start of the workers included."""
    text_bytes: int
    """UTF-8 bytes that this run, without what an earlier one did, tokenised."""

    @property
    def sidecar(self) -> Sidecar:
        """Of the only output."""
        (sidecar,) = self.outputs.values()
        return sidecar


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    settings: PreprocessSettings,
    show_progress: bool = True,
) -> PreprocessResult:
    """Writes `OUTPUT.bin`, `OUTPUT.idx`, `OUTPUT.json` and, with a segmenter, `OUTPUT.words`. The bytes depend neither
    on the number of workers nor on whether the run was interrupted.

    With several text keys there is one dataset for each, `OUTPUT_KEY`; with a language key one for each language,
    `OUTPUT_LANGUAGE`; with both `OUTPUT_KEY_LANGUAGE`. A shard is `OUTPUT_00003-of-00008`. Empty documents are left out
    and counted. The files appear when all is done, or not at all; a run that ends early leaves `OUTPUT.unfinished` if
    there is something to go on from.

    Args:
        inputs: what `inputs.resolve_inputs` takes; their order is the order of the documents.
        tokenizer: Hugging Face tokenizer directory or sentencepiece model.
        output: path without ending; its directory is made.
        settings: see there.
        show_progress: whether to write a progress bar to standard error.

    Raises:
        UserError: bad options, inputs or documents; an unusable tokenizer or segmenter; nothing left to write; a full
            disk; an input that changed.
        KeyboardInterrupt: with what is kept as its text.
    """
    check_settings(settings)
    check_output_prefix(str(output))
    sources = resolve_inputs(inputs)
    if settings.shard is not None:
        check_shard(settings.shard, sources)
        output = f"{output}_{settings.shard[0]:05d}-of-{settings.shard[1]:05d}"
    loaded = load_tokenizer(tokenizer)
    tokenise = BlockTokeniser(
        TokeniserSettings(str(tokenizer), settings.fields, settings.limits, settings.language, settings.segmenter),
        loaded,
    )
    start_s = time.monotonic()
    run = _Run(sources, tokenise, str(tokenizer), str(output), settings)
    if not settings.overwrite and not has_unfinished(output):
        finished = run.finished()
        if finished:
            return PreprocessResult(finished, 0.0, 0.0, 0)
    with open_unfinished(output, run.identity(), settings.resume) as unfinished:
        try:
            return run.execute(unfinished, show_progress, start_s)
        except UnusableRunError:
            raise
        except UserError as error:
            raise _with_kept(error, unfinished) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted(unfinished)) from None
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise _with_kept(write_error(unfinished.directory, error.errno), unfinished) from error


def _interrupted(unfinished: Unfinished) -> str:
    if not unfinished.is_kept:
        return "interrupted; nothing was saved yet, nothing is left behind"
    return (
        f"interrupted; {unfinished.kept_documents:,} documents are kept in {unfinished.directory}, the same command "
        "with "
        "--resume goes on from there"
    )


def _with_kept(error: UserError, unfinished: Unfinished) -> UserError:
    if not unfinished.is_kept:
        return error
    return UserError(
        f"{error} ({unfinished.kept_documents:,} documents are kept in {unfinished.directory}; go on from there with "
        "--resume)"
    )


def _lies_at(prefix: str) -> bool:
    return any(path(prefix).exists() for path in (bin_path, idx_path, sidecar_path))


def _sidecars_of(output: str) -> Iterator[Path]:
    return Path(output).parent.glob(f"{glob.escape(Path(output).name)}_*.json")


def _in_the_way(prefix: str) -> UserError:
    return UserError(
        f"{prefix}.bin: a dataset lies here already; replace it with --overwrite, or choose another --output (--resume "
        "leaves one of the same inputs and options as it is)"
    )


@dataclass
class _Run:
    sources: list[Input]
    tokenise: BlockTokeniser
    tokenizer_path: str
    output: str
    settings: PreprocessSettings
    modified_ns: list[int] = field(init=False)
    routes: dict[str, Route] = field(default_factory=dict)
    """Prefix -> the dataset there, of those that are begun."""

    def __post_init__(self) -> None:
        self.modified_ns = [0 if source.kind == "hub" else os.stat(source.name).st_mtime_ns for source in self.sources]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.tokenise.tokenizer

    def identity(self) -> dict[str, Any]:
        """Everything that decides the bytes of the output."""
        settings = self.settings
        return {
            "inputs": self._inputs_digest(),
            "tokenizer": self.tokenizer.fingerprint,
            "language": settings.language,
            **asdict(settings.fields),
            "segmenter": settings.segmenter,
            "shard": settings.shard,
            "fast engine": settings.use_fast_engine,
            **asdict(settings.limits),
        }

    def finished(self) -> dict[str, Sidecar]:
        """With `resume`, the datasets that a finished run of the same kind left; empty if nothing is there.

        Raises:
            UserError: something else lies there.
        """
        settings = self.settings
        if settings.language is not None:
            prefixes = [self._prefix(Route(column, settings.language)) for column in range(len(settings.fields.texts))]
            there = [prefix for prefix in prefixes if _lies_at(prefix)]
        else:
            # Which languages there are, the documents alone know.
            prefixes = there = sorted(str(path)[: -len(".json")] for path in _sidecars_of(self.output))
        if settings.resume and there == prefixes:
            found = {prefix: load_sidecar(prefix) for prefix in there if sidecar_path(prefix).exists()}
            if len(found) == len(there) and all(self._is_ours(sidecar) for sidecar in found.values()):
                return found
        if there and settings.language is not None:
            raise _in_the_way(there[0])
        return {}

    def _is_ours(self, sidecar: Sidecar) -> bool:
        settings = self.settings
        return (
            sidecar.language == (settings.language or sidecar.language)
            and sidecar.tokenizer.fingerprint == self.tokenizer.fingerprint
            and tuple(sidecar.text_keys) in settings.fields.texts
            and sidecar.segmenter == resolve_segmenter(settings.segmenter, sidecar.language)
            and sidecar.shard == shard_text(settings.shard)
            and sidecar.inputs == [InputRecord(source.name, source.bytes) for source in self.sources]
        )

    def _inputs_digest(self) -> str:
        """Names, sizes and times of all inputs. A digest: the journal is written often, and there may be a million."""
        digest = hashlib.sha256()
        for source, modified in zip(self.sources, self.modified_ns, strict=True):
            digest.update(f"{source.name}\0{source.bytes}\0{modified}\0".encode("utf-8", "surrogateescape"))
        total = sum(source.bytes for source in self.sources)
        return f"{len(self.sources):,} of {total:,} bytes together, sha256:{digest.hexdigest()[:16]}"

    def execute(self, unfinished: Unfinished, show_progress: bool, start_s: float) -> PreprocessResult:
        journal = unfinished.journal
        before = sum(state["text_bytes"] for state in journal.outputs)
        if not journal.is_complete:
            unfinished.open_writers(lambda language: resolve_segmenter(self.settings.segmenter, language) is not None)
            self.routes = {self._prefix(writer.route): writer.route for writer in unfinished.writers}
            total = sum(source.bytes for source in self.sources)
            if self.settings.shard is not None:
                total //= self.settings.shard[1]
            with Progress("preprocess", total or None, unit="B", unit_scale=True, enabled=show_progress) as progress:
                progress.update(journal.disk_bytes)
                self._tokenise_all(unfinished, progress)
            self._check_unchanged()
            self._finish(unfinished)
        outputs = self._publish(unfinished)
        text_bytes = sum(sidecar.bytes for sidecar in outputs.values()) - before
        ratio = journal.counted_tokens / max(journal.counted_words, 1)
        return PreprocessResult(outputs, ratio, time.monotonic() - start_s, text_bytes)

    def _tokenise_all(self, unfinished: Unfinished, progress: Progress) -> None:
        journal, settings = unfinished.journal, self.settings
        choice = EngineChoice(not settings.use_fast_engine or journal.plain_from is not None)
        parts = extents(self.sources, settings.shard)
        places = self._places(journal.input, parts)
        if journal.position > 0:
            places.lines = journal.lines
        since_saved = 0
        blocks = self._blocks(parts, journal.input, journal.position)
        results = tokenise_in_order(blocks, self.tokenise, settings.workers, choice)
        with closing(results):
            for block, result in results:
                if block.source != journal.input:
                    journal.input = block.source
                    places = self._places(journal.input, parts)
                self._take(block, result, unfinished, places, choice)
                places.skip(result.lines)
                journal.position, journal.lines = block.next_position, places.lines
                journal.disk_bytes += block.disk_bytes
                progress.update(block.disk_bytes)
                since_saved += block.size
                if since_saved >= settings.save_every_bytes:
                    unfinished.save()
                    since_saved = 0

    def _blocks(self, parts: Sequence[Extent | None], first: int, position: int) -> Iterator[Block]:
        """The blocks of all inputs from a place on."""
        settings = self.settings
        for number, extent in enumerate(parts):
            if number < first or extent is None:
                continue
            start = position if number == first else 0
            for block in read_blocks(self.sources[number], settings.fields.columns, settings.limits, extent, start):
                yield replace(block, source=number)

    def _places(self, number: int, parts: Sequence[Extent | None]) -> Places:
        """Of an input, at the beginning of the part that is read."""
        source, extent = self.sources[number], parts[number]
        # Lines in front of a shard's first byte are not counted; rows are.
        is_counted = self.settings.shard is None or source.kind != "jsonl" or source.compression
        first = 0 if extent is None else extent.start
        return Places(source.name, unit_of(source), first if is_counted else None)

    def _take(
        self, block: Block, result: TokenisedBlock, unfinished: Unfinished, places: Places, choice: EngineChoice
    ) -> None:
        journal = unfinished.journal
        if result.fault is not None:
            raise UserError(f"{places.of(result.fault[0], -1)}: {result.fault[1]}")
        for number, byte, why in result.problems:
            where = block.place or places.of(number, byte)
            if self.settings.on_error == "stop" and why != EMPTY:
                raise ReadError(where, why)
            journal.problems.add(where, why)
        journal.problems.count += result.unlisted
        if result.mismatch is not None and journal.plain_from is None:
            journal.plain_from = places.of(result.mismatch, -1)
            choice.plain = True
        for route, texts in result.routes.items():
            self._check_route(route, places)
            unfinished.writer(route).append(texts)
        journal.counted_words += result.counted_words
        journal.counted_tokens += result.counted_tokens

    def _check_route(self, route: Route, places: Places) -> None:
        """Refuses what no dataset must be opened for."""
        prefix = self._prefix(route)
        if prefix not in self.routes and not self.settings.overwrite and _lies_at(prefix):
            raise _in_the_way(prefix)
        other = self.routes.setdefault(prefix, route)
        keys, language_key = self.settings.fields.text_keys, self.settings.fields.language_key
        if other != route:
            raise UserError(
                f"{places.name}: {keys[other.column]!r} in {other.language} and {keys[route.column]!r} in "
                f"{route.language} would both be {prefix}; read one of these keys alone, with an --output of its own"
            )
        if len(self.routes) > _MOST_DATASETS:
            raise UserError(
                f"{places.name}: more than {_MOST_DATASETS} datasets by the language under {language_key!r}; expected "
                "a key that holds language codes"
            )

    def _check_unchanged(self) -> None:
        for source, modified in zip(self.sources, self.modified_ns, strict=True):
            if source.kind != "hub":
                facts = os.stat(source.name)
                if (facts.st_size, facts.st_mtime_ns) != (source.bytes, modified):
                    raise UserError(
                        f"{source.name}: changed while it was read; wait until it is complete and preprocess it again"
                    )

    def _finish(self, unfinished: Unfinished) -> None:
        """Writes indices and sidecars beside the tokens, and says in the journal that only names are missing."""
        journal, settings = unfinished.journal, self.settings
        if not unfinished.writers:
            if settings.shard is None:
                listed = journal.problems.listed
                first = f"{listed[0].where}: {listed[0].why}" if listed else "they hold nothing but white space"
                raise UserError(
                    f"no document left of {len(self.sources)} inputs ({journal.problems.count} skipped); first reason: "
                    f"{first}"
                )
            if settings.language is not None:
                # A shard may be empty; its files stand for it when the shards are put together.
                for column in range(len(settings.fields.texts)):
                    unfinished.writer(Route(column, settings.language))
        journal.outputs = [writer.sync() for writer in unfinished.writers]
        for writer in unfinished.writers:
            sums = writer.finish(token_dtype(self.tokenizer.vocab_size))
            write_sidecar(self._sidecar(writer, unfinished, sums), writer.paths["json"])
            for ending in writer.paths.keys() & {"words", "json"}:
                sync_file(writer.paths[ending])
        # From here on a run that goes on takes the files as they lie.
        journal.is_complete = True
        unfinished.save()

    def _publish(self, unfinished: Unfinished) -> dict[str, Sidecar]:
        """Gives the finished files their names, the sidecars last: no command takes files without one for a dataset."""
        obsolete: list[Path] = []
        moves: list[tuple[Path, Path]] = []
        prefixes: list[str] = []
        for number, state in enumerate(unfinished.journal.outputs):
            prefix = self._prefix(Route(state["column"], state["language"]))
            prefixes.append(prefix)
            has_words = resolve_segmenter(self.settings.segmenter, state["language"]) is not None
            for path in (bin_path(prefix), idx_path(prefix), words_path(prefix), sidecar_path(prefix)):
                source = unfinished.directory / f"{number}{path.name[len(Path(prefix).name) :]}"
                if path != words_path(prefix) or has_words:
                    moves.append((source, path))
                # Of the dataset that lay here before: a sidecar beside other tokens, a bitmap that the new one lacks.
                if path == words_path(prefix) and not has_words or path == sidecar_path(prefix) and source.exists():
                    obsolete.append(path)
        unfinished.publish(moves, obsolete)
        return {prefix: load_sidecar(prefix) for prefix in prefixes}

    def _prefix(self, route: Route) -> str:
        fields = self.settings.fields
        parts = [self.output]
        if len(fields.texts) > 1:
            parts.append(fields.text_keys[route.column])
        if fields.language_key is not None:
            parts.append(route.language)
        return "_".join(parts)

    def _sidecar(self, writer: TokenWriter, unfinished: Unfinished, sums: dict[str, str]) -> Sidecar:
        journal, settings = unfinished.journal, self.settings
        return Sidecar(
            language=writer.route.language,
            tokenizer=TokenizerRecord(
                os.path.abspath(self.tokenizer_path), self.tokenizer.fingerprint, self.tokenizer.vocab_size
            ),
            eod_id=self.tokenizer.eod_id,
            documents=writer.documents,
            tokens=writer.tokens,
            bytes=writer.text_bytes,
            skipped=journal.problems.listed,
            skipped_count=journal.problems.count,
            inputs=[InputRecord(source.name, source.bytes) for source in self.sources],
            segmenter=resolve_segmenter(settings.segmenter, writer.route.language),
            checksums=sums,
            engine=self._engine(writer.route.language, journal.plain_from),
            text_keys=list(settings.fields.texts[writer.route.column]),
            shard=shard_text(settings.shard),
        )

    def _engine(self, language: str, plain_from: str | None) -> str:
        plain = self.tokenizer.library
        if not self.settings.use_fast_engine or self.tokenise.segmenter(language) is not None:
            return plain
        if self.tokenise.engine(language) is None:
            return plain
        return "gigatoken" if plain_from is None else f"gigatoken, from {plain_from} on {plain}: the ids differed there"
