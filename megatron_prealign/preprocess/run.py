"""Converts text files to .bin/.idx token files: worker processes tokenise blocks, which are written in order."""

import glob
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_prealign.corpus.blocks import Block, Extent, read_blocks, shard_extents
from megatron_prealign.corpus.inputs import Input, resolve_inputs
from megatron_prealign.corpus.readers import EMPTY, LocationTracker, ReadError, location_unit
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
    UnfinishedRun,
    UnusableRunError,
    has_unfinished,
    open_unfinished,
)
from megatron_prealign.preprocess.settings import PreprocessSettings as PreprocessSettings
from megatron_prealign.preprocess.settings import check_settings, check_shard, shard_text
from megatron_prealign.preprocess.tokenise import BlockTokeniser, Route, TokenisedBlock, TokeniserSettings
from megatron_prealign.preprocess.worker_pool import EngineChoice, tokenise_in_order
from megatron_prealign.progress import Progress
from megatron_prealign.text import plural
from megatron_prealign.tokenizer.base import Tokenizer
from megatron_prealign.tokenizer.load import load_tokenizer
from megatron_prealign.tokenizer.segmenters import resolve_segmenter

# With more, the language key does not contain languages; each dataset opens three files.
_MOST_DATASETS = 500


@dataclass(frozen=True)
class PreprocessResult:
    """Result of a `preprocess` run."""

    outputs: dict[str, Sidecar]
    """Prefix -> sidecar of the dataset; one, unless there are several keys or a language key."""
    tokens_per_word: float
    """Tokens per white-space-separated word in a sample of the documents."""
    seconds: float
    """Time for reading, tokenising and writing, including the start of the workers; 0 if nothing had to be done."""
    text_bytes: int
    """UTF-8 bytes tokenised by this run, without those of the run it resumed."""

    @property
    def sidecar(self) -> Sidecar:
        """Sidecar of the only output."""
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
    on the number of workers nor on interruptions.

    Several text keys write one dataset each, `OUTPUT_KEY`; a language key writes one per language, `OUTPUT_LANGUAGE`;
    both write `OUTPUT_KEY_LANGUAGE`. A shard is written to `OUTPUT_00003-of-00008`. Empty documents are skipped and
    counted. The files appear only when all is done; a run that ends early leaves `OUTPUT.unfinished` if it can be
    resumed.

    Args:
        inputs: inputs for `inputs.resolve_inputs`; their order is the document order.
        tokenizer: Hugging Face tokenizer directory or sentencepiece model.
        output: path prefix; its directory is created.
        settings: see `PreprocessSettings`.
        show_progress: whether to write a progress bar to standard error.

    Raises:
        UserError: invalid options, inputs or documents; an unusable tokenizer or segmenter; no documents; a full disk;
            an input changed while it was read.
        KeyboardInterrupt: its message says what was saved.
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
            raise _with_resume_hint(error, unfinished) from error
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_interrupted_message(unfinished)) from None
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise _with_resume_hint(write_error(unfinished.directory, error.errno), unfinished) from error


def _interrupted_message(unfinished: UnfinishedRun) -> str:
    if not unfinished.is_saved:
        return "interrupted; nothing was saved and no files were left behind"
    return (
        f"interrupted; saved {plural(unfinished.saved_documents, 'document')} in {unfinished.directory}; resume with "
        "the same command and --resume"
    )


def _with_resume_hint(error: UserError, unfinished: UnfinishedRun) -> UserError:
    if not unfinished.is_saved:
        return error
    return UserError(
        f"{error} (saved {plural(unfinished.saved_documents, 'document')} in {unfinished.directory}; resume with "
        "--resume)"
    )


def _dataset_exists(prefix: str) -> bool:
    return any(path(prefix).exists() for path in (bin_path, idx_path, sidecar_path))


def _sidecars_of(output: str) -> Iterator[Path]:
    return Path(output).parent.glob(f"{glob.escape(Path(output).name)}_*.json")


def _already_exists(prefix: str) -> UserError:
    return UserError(
        f"{prefix}.bin: dataset already exists; replace it with --overwrite or choose another --output (--resume keeps "
        "a dataset of the same inputs and options)"
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
    """Prefix -> route of each open dataset."""

    def __post_init__(self) -> None:
        self.modified_ns = [0 if source.kind == "hub" else os.stat(source.name).st_mtime_ns for source in self.sources]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.tokenise.tokenizer

    def identity(self) -> dict[str, Any]:
        """Everything that affects the output bytes."""
        settings = self.settings
        return {
            "inputs": self._inputs_fingerprint(),
            "tokenizer": self.tokenizer.fingerprint,
            "language": settings.language,
            **asdict(settings.fields),
            "segmenter": settings.segmenter,
            "shard": settings.shard,
            "fast engine": settings.use_fast_engine,
            **asdict(settings.limits),
        }

    def finished(self) -> dict[str, Sidecar]:
        """With `resume`, returns the datasets of a finished run with the same settings; empty if nothing exists.

        Raises:
            UserError: another dataset exists.
        """
        settings = self.settings
        if settings.language is not None:
            prefixes = [self._prefix(Route(column, settings.language)) for column in range(len(settings.fields.texts))]
            existing = [prefix for prefix in prefixes if _dataset_exists(prefix)]
        else:
            # The languages are known only from the documents.
            prefixes = existing = sorted(str(path)[: -len(".json")] for path in _sidecars_of(self.output))
        if settings.resume and existing == prefixes:
            sidecars = {prefix: load_sidecar(prefix) for prefix in existing if sidecar_path(prefix).exists()}
            if len(sidecars) == len(existing) and all(self._matches(sidecar) for sidecar in sidecars.values()):
                return sidecars
        if existing and settings.language is not None:
            raise _already_exists(existing[0])
        return {}

    def _matches(self, sidecar: Sidecar) -> bool:
        settings = self.settings
        return (
            sidecar.language == (settings.language or sidecar.language)
            and sidecar.tokenizer.fingerprint == self.tokenizer.fingerprint
            and tuple(sidecar.text_keys) in settings.fields.texts
            and sidecar.segmenter == resolve_segmenter(settings.segmenter, sidecar.language)
            and sidecar.shard == shard_text(settings.shard)
            and sidecar.inputs == [InputRecord(source.name, source.bytes) for source in self.sources]
        )

    def _inputs_fingerprint(self) -> str:
        """Hash of names, sizes and times of all inputs: the journal is written often, and there may be a million."""
        digest = hashlib.sha256()
        for source, modified in zip(self.sources, self.modified_ns, strict=True):
            digest.update(f"{source.name}\0{source.bytes}\0{modified}\0".encode("utf-8", "surrogateescape"))
        total = sum(source.bytes for source in self.sources)
        return f"{plural(len(self.sources), 'file')}, {plural(total, 'byte')}, sha256:{digest.hexdigest()[:16]}"

    def execute(self, unfinished: UnfinishedRun, show_progress: bool, start_s: float) -> PreprocessResult:
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

    def _tokenise_all(self, unfinished: UnfinishedRun, progress: Progress) -> None:
        journal, settings = unfinished.journal, self.settings
        choice = EngineChoice(not settings.use_fast_engine or journal.plain_from is not None)
        extents = shard_extents(self.sources, settings.shard)
        tracker = self._tracker(journal.input, extents)
        if journal.position > 0:
            tracker.lines = journal.lines
        since_saved = 0
        blocks = self._blocks(extents, journal.input, journal.position)
        results = tokenise_in_order(blocks, self.tokenise, settings.workers, choice)
        with closing(results):
            for block, result in results:
                if block.source != journal.input:
                    journal.input = block.source
                    tracker = self._tracker(journal.input, extents)
                self._process(block, result, unfinished, tracker, choice)
                tracker.advance(result.lines)
                journal.position, journal.lines = block.next_position, tracker.lines
                journal.disk_bytes += block.disk_bytes
                progress.update(block.disk_bytes)
                since_saved += block.size
                if since_saved >= settings.save_every_bytes:
                    unfinished.save()
                    since_saved = 0

    def _blocks(self, extents: Sequence[Extent | None], first: int, position: int) -> Iterator[Block]:
        """Yields the blocks of all inputs from `position` of the input `first`."""
        settings = self.settings
        for number, extent in enumerate(extents):
            if number < first or extent is None:
                continue
            start = position if number == first else 0
            for block in read_blocks(self.sources[number], settings.fields.columns, settings.limits, extent, start):
                yield replace(block, source=number)

    def _tracker(self, number: int, extents: Sequence[Extent | None]) -> LocationTracker:
        """Returns the location tracker of an input, at the start of the extent that is read."""
        source, extent = self.sources[number], extents[number]
        # Lines before the first byte of a shard are not counted; rows are.
        is_counted = self.settings.shard is None or source.kind != "jsonl" or source.compression
        first = 0 if extent is None else extent.start
        return LocationTracker(source.name, location_unit(source), first if is_counted else None)

    def _process(
        self,
        block: Block,
        result: TokenisedBlock,
        unfinished: UnfinishedRun,
        tracker: LocationTracker,
        choice: EngineChoice,
    ) -> None:
        journal = unfinished.journal
        if result.fatal_error is not None:
            raise UserError(f"{tracker.location(result.fatal_error[0], -1)}: {result.fatal_error[1]}")
        for number, byte, why in result.problems:
            where = block.location or tracker.location(number, byte)
            if self.settings.on_error == "stop" and why != EMPTY:
                raise ReadError(where, why)
            journal.problems.add(where, why)
        journal.problems.count += result.unlisted
        if result.mismatch is not None and journal.plain_from is None:
            journal.plain_from = tracker.location(result.mismatch, -1)
            choice.plain = True
        for route, texts in result.routes.items():
            self._check_route(route, tracker)
            unfinished.writer(route).append(texts)
        journal.counted_words += result.counted_words
        journal.counted_tokens += result.counted_tokens

    def _check_route(self, route: Route, tracker: LocationTracker) -> None:
        """Checks that a dataset may be opened for this route."""
        prefix = self._prefix(route)
        if prefix not in self.routes and not self.settings.overwrite and _dataset_exists(prefix):
            raise _already_exists(prefix)
        other = self.routes.setdefault(prefix, route)
        keys, language_key = self.settings.fields.text_keys, self.settings.fields.language_key
        if other != route:
            raise UserError(
                f"{tracker.name}: {keys[other.column]!r} in {other.language} and {keys[route.column]!r} in "
                f"{route.language} would both be written to {prefix}; preprocess one of these keys separately, with "
                "another --output"
            )
        if len(self.routes) > _MOST_DATASETS:
            raise UserError(
                f"{tracker.name}: {language_key!r} has values for more than {_MOST_DATASETS} datasets; set "
                "--language-key to a key with language codes"
            )

    def _check_unchanged(self) -> None:
        for source, modified in zip(self.sources, self.modified_ns, strict=True):
            if source.kind != "hub":
                status = os.stat(source.name)
                if (status.st_size, status.st_mtime_ns) != (source.bytes, modified):
                    raise UserError(
                        f"{source.name}: file changed while it was read; wait until it is complete, then rerun"
                    )

    def _finish(self, unfinished: UnfinishedRun) -> None:
        """Writes indices and sidecars next to the tokens, and marks the journal as complete except for the renames."""
        journal, settings = unfinished.journal, self.settings
        if not unfinished.writers:
            if settings.shard is None:
                listed = journal.problems.listed
                reason = "only white space"
                if listed:
                    reason = f"{journal.problems.count} skipped, first: {listed[0].where}: {listed[0].why}"
                raise UserError(
                    f"no documents in the inputs ({len(self.sources)}): {reason}; check --input and --text-key"
                )
            if settings.language is not None:
                # A shard may be empty; merging the shards requires its files.
                for column in range(len(settings.fields.texts)):
                    unfinished.writer(Route(column, settings.language))
        journal.outputs = [writer.sync() for writer in unfinished.writers]
        for writer in unfinished.writers:
            sums = writer.finish(token_dtype(self.tokenizer.vocab_size))
            write_sidecar(self._sidecar(writer, unfinished, sums), writer.paths["json"])
            for extension in writer.paths.keys() & {"words", "json"}:
                sync_file(writer.paths[extension])
        # From here on, a resumed run uses the files unchanged.
        journal.is_complete = True
        unfinished.save()

    def _publish(self, unfinished: UnfinishedRun) -> dict[str, Sidecar]:
        """Renames the finished files, the sidecars last: no command accepts a dataset without one."""
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
                # Files of a replaced dataset: a sidecar next to new tokens, a bitmap that the new dataset lacks.
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

    def _sidecar(self, writer: TokenWriter, unfinished: UnfinishedRun, sums: dict[str, str]) -> Sidecar:
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
        return "gigatoken" if plain_from is None else f"gigatoken, then {plain} from {plain_from} on (ids differed)"
