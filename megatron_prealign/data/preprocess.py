"""Text files to .bin/.idx token files: blocks of documents are tokenised by worker processes and written in order."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from megatron_prealign.data.files import make_folder, write_all_atomically
from megatron_prealign.data.indexed import bin_path, idx_path, import_indexed_dataset, token_dtype
from megatron_prealign.data.readers import (
    Block,
    OnError,
    Problems,
    ReadError,
    check_inputs,
    parse_block,
    read_blocks,
)
from megatron_prealign.data.segmenters import Segmenter, checked_word_starts, open_segmenter
from megatron_prealign.data.sidecar import InputRecord, Sidecar, TokenizerRecord, sidecar_path, write_sidecar
from megatron_prealign.data.tokenizer import Tokenizer, load_tokenizer
from megatron_prealign.data.word_bitmap import BitmapWriter, token_word_starts, words_path
from megatron_prealign.errors import UserError
from megatron_prealign.progress import Progress

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

# Blocks in flight per worker: one at work, one waiting, so that no worker starves while the parent writes.
_BLOCKS_PER_WORKER = 2
# The index stores the length of a document as int32.
_MAX_DOCUMENT_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class PreprocessResult:
    """What one run of `preprocess` did."""

    sidecar: Sidecar
    """As written to PREFIX.json."""
    words: int
    """Stretches of text between white space."""
    seconds: float
    """Time for reading, tokenising and writing; the start of the workers included, the import of torch not."""


@dataclass
class _Tokenised:
    """The documents of one block, as a worker hands them back."""

    ids: numpy.ndarray
    """All documents behind each other, each with its end-of-document id, in the dtype of the file."""
    lengths: numpy.ndarray
    """int64 [documents], tokens of each."""
    text_bytes: int
    words: int
    problems: Problems
    word_starts: numpy.ndarray | None
    """bool, one for each of `ids`; None without a segmenter."""


@dataclass
class _Totals:
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    words: int = 0
    problems: Problems = field(default_factory=Problems)

    def add(self, block: _Tokenised) -> None:
        self.documents += len(block.lengths)
        self.tokens += len(block.ids)
        self.text_bytes += block.text_bytes
        self.words += block.words
        self.problems.extend(block.problems)


@dataclass(frozen=True)
class _BlockTokeniser:
    """Everything that turns a block into ids; what a worker process keeps between blocks."""

    tokenizer: Tokenizer
    language: str
    text_key: str
    on_error: OnError
    segmenter: Segmenter | None
    segmenter_name: str | None

    @classmethod
    def open(
        cls, tokenizer: Tokenizer, language: str, text_key: str, on_error: OnError, segmenter_name: str | None
    ) -> "_BlockTokeniser":
        segmenter = None if segmenter_name is None else open_segmenter(segmenter_name, language)
        return cls(tokenizer, language, text_key, on_error, segmenter, segmenter_name)

    def __call__(self, block: Block) -> _Tokenised:
        eod, dtype = self.tokenizer.eod_id, token_dtype(self.tokenizer.vocab_size)
        problems = Problems()
        texts: list[str] = []
        places: list[str] = []
        for text, where in parse_block(block, self.text_key, self.on_error, problems):
            if not text or text.isspace():
                problems.add(where, "empty document")
                continue
            texts.append(text)
            places.append(where)
        rows, word_starts = self._encode(texts, places)
        arrays: list[numpy.ndarray] = []
        for row, where in zip(rows, places, strict=True):
            ids = numpy.array([*row, eod], dtype=numpy.int64)
            _check_document(ids, self.tokenizer.vocab_size, where)
            arrays.append(ids.astype(dtype))
        text_bytes = sum(len(text.encode("utf-8")) for text in texts)
        words = sum(len(text.split()) for text in texts)
        lengths = numpy.array([len(array) for array in arrays], dtype=numpy.int64)
        ids_of_all = numpy.concatenate([numpy.empty(0, dtype), *arrays])
        return _Tokenised(ids_of_all, lengths, text_bytes, words, problems, word_starts)

    def _encode(self, texts: list[str], places: list[str]) -> tuple[list[list[int]], numpy.ndarray | None]:
        """The ids of every text, and where words start among them with one end-of-document token each."""
        if self.segmenter is None or self.segmenter_name is None:
            return self.tokenizer.encode_batch(texts, self.language), None
        rows: list[list[int]] = []
        bits = [numpy.empty(0, dtype=numpy.bool_)]
        for text, where in zip(texts, places, strict=True):
            ids, spans = self.tokenizer.encode_with_offsets(text, self.language)
            starts = checked_word_starts(self.segmenter, self.segmenter_name, text, where)
            rows.append(ids)
            bits += [token_word_starts(text, spans, starts), numpy.ones(1, dtype=numpy.bool_)]
        return rows, numpy.concatenate(bits)


def _check_document(ids: numpy.ndarray, vocab_size: int, where: str) -> None:
    """Checks ids before they are cast to the file's dtype, where a number too large would silently become another."""
    if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise UserError(
            f"{where}: the tokenizer gave ids from {ids.min()} to {ids.max()}, expected 0 to {vocab_size - 1}; "
            "its files do not fit together, save the tokenizer again"
        )
    if len(ids) > _MAX_DOCUMENT_TOKENS:
        raise UserError(f"{where}: {len(ids):,} tokens, at most {_MAX_DOCUMENT_TOKENS:,} fit; split the document")


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    language: str,
    text_key: str = "text",
    on_error: OnError = "stop",
    workers: int = 1,
    show_progress: bool = True,
    segmenter: str | None = None,
) -> PreprocessResult:
    """Writes `OUTPUT.bin`, `OUTPUT.idx`, `OUTPUT.json` and, with a segmenter, `OUTPUT.words`. The bytes do not depend
    on `workers`.

    Empty documents are left out and counted. The files appear when all is done, or not at all.

    Args:
        inputs: `.jsonl` or `.txt` files, also gzipped; their order is the order of the documents.
        tokenizer: Hugging Face tokenizer folder or sentencepiece model.
        output: path without ending; its folder is made.
        language: language code of all the documents.
        text_key: key of the text in each JSON object.
        on_error: `stop` at the first bad document or file, or `skip` it and list it in the sidecar.
        workers: processes that tokenise; with 1 this process does, where a Hugging Face tokenizer uses its own threads.
        show_progress: whether to write a progress bar to standard error.
        segmenter: who marks the words in `OUTPUT.words`, a name for `segmenters.open_segmenter`; None writes no such
            file. The ids are the same.

    Raises:
        UserError: bad options, inputs or documents; an unusable tokenizer or segmenter; nothing left to write.
    """
    total_bytes = check_inputs(inputs)
    if workers < 1:
        raise UserError(f"workers is {workers}; expected at least 1")
    if not language.strip():
        raise UserError("the language code is empty; expected one like en or de, as in the dictionary")
    _check_output(output)
    loaded = load_tokenizer(tokenizer)
    tokenise = _BlockTokeniser.open(loaded, language, text_key, on_error, segmenter)
    # Megatron-Core imports torch, several seconds; only after everything that a user can mistype is checked.
    import_indexed_dataset()
    start_s = time.monotonic()
    make_folder(Path(output).parent, "output")
    # The sidecar last: no command takes files without it for a dataset.
    outputs = [bin_path(output), idx_path(output), words_path(output), sidecar_path(output)]
    if segmenter is None:
        outputs.remove(words_path(output))
    with (
        write_all_atomically(outputs) as temporary,
        Progress("preprocess", total_bytes, unit="B", unit_scale=True, enabled=show_progress) as progress,
    ):
        totals = _write_tokens(inputs, tokenise, str(tokenizer), workers, temporary[:-1], progress)
        sidecar = Sidecar(
            language=language,
            tokenizer=TokenizerRecord(str(tokenizer), loaded.fingerprint, loaded.vocab_size),
            eod_id=loaded.eod_id,
            documents=totals.documents,
            tokens=totals.tokens,
            bytes=totals.text_bytes,
            skipped=totals.problems.listed,
            skipped_count=totals.problems.count,
            inputs=[InputRecord(str(path), os.path.getsize(path)) for path in inputs],
            segmenter=segmenter,
        )
        write_sidecar(sidecar, temporary[-1])
    if segmenter is None:
        # Of the dataset that lay here before; the new sidecar does not name it.
        words_path(output).unlink(missing_ok=True)
    return PreprocessResult(sidecar, totals.words, time.monotonic() - start_s)


def _write_tokens(
    inputs: Sequence[str | Path],
    tokenise: _BlockTokeniser,
    tokenizer_path: str,
    workers: int,
    targets: list[Path],
    progress: Progress,
) -> _Totals:
    """Tokenises all inputs into `targets`: the tokens, their index and, with a segmenter, the bitmap of words."""
    totals = _Totals()
    dtype = token_dtype(tokenise.tokenizer.vocab_size)
    builder = import_indexed_dataset().IndexedDatasetBuilder(str(targets[0]), dtype=dtype)
    with closing(builder.data_file), ExitStack() as stack:
        bitmap = stack.enter_context(closing(BitmapWriter(targets[2]))) if len(targets) > 2 else None
        blocks = _read_all(inputs, tokenise.on_error, totals.problems)
        for block, result in _in_order(blocks, tokenise, tokenizer_path, workers):
            _write(builder, result)
            if bitmap is not None and result.word_starts is not None:
                bitmap.append(result.word_starts)
            totals.add(result)
            progress.update(block.disk_bytes)
        if totals.documents == 0:
            raise UserError(
                f"no document left of {len(inputs)} input files ({totals.problems.count} skipped); "
                f"first reason: {_first_reason(totals.problems)}"
            )
        builder.finalize(str(targets[1]))
    return totals


def _first_reason(problems: Problems) -> str:
    return f"{problems.listed[0].where}: {problems.listed[0].why}" if problems.listed else "none"


def _check_output(output: str | Path) -> None:
    if str(output).endswith((".bin", ".idx", ".words", ".json")):
        raise UserError(
            f"output {output}: expected a path without ending; .bin, .idx, .json and, with a segmenter, "
            ".words are added to it"
        )
    if str(output).endswith("/") or Path(output).is_dir():
        raise UserError(f"output {output}: is a folder; expected a path inside it, for example {Path(output) / 'de'}")


def _write(builder: "IndexedDatasetBuilder", block: _Tokenised) -> None:
    start = 0
    for length in block.lengths.tolist():
        builder.add_document(block.ids[start : start + length], [length])
        start += length


def _read_all(inputs: Sequence[str | Path], on_error: OnError, problems: Problems) -> Iterator[Block]:
    """The blocks of all files; damage to a file ends that file only, if `on_error` says so."""
    for path in inputs:
        try:
            yield from read_blocks(path)
        except ReadError as error:
            if on_error == "stop":
                raise
            problems.add(error.where, error.why)


def _in_order(
    blocks: Iterator[Block], tokenise: _BlockTokeniser, tokenizer_path: str, workers: int
) -> Iterator[tuple[Block, _Tokenised]]:
    """Tokenises blocks, in this process or several, and gives the results in the order of the blocks."""
    if workers == 1:
        for block in blocks:
            yield block, tokenise(block)
        return
    pool = ProcessPoolExecutor(
        workers,
        # Forking a process in which torch and tokenizers may hold threads can deadlock the child.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(
            tokenizer_path,
            tokenise.language,
            tokenise.text_key,
            tokenise.on_error,
            tokenise.segmenter_name,
        ),
    )
    try:
        waiting: deque[tuple[Block, Future[_Tokenised]]] = deque()
        for block in blocks:
            waiting.append((block, pool.submit(_tokenise_in_worker, block)))
            if len(waiting) >= workers * _BLOCKS_PER_WORKER:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died (out of memory?); give fewer --workers than {workers}, or split long documents"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# What a worker process keeps between blocks; set once when it starts, never in the parent.
_worker: _BlockTokeniser | None = None


def _start_worker(
    tokenizer_path: str, language: str, text_key: str, on_error: OnError, segmenter_name: str | None
) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes share the cores already; the library's threads in each would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = _BlockTokeniser.open(load_tokenizer(tokenizer_path), language, text_key, on_error, segmenter_name)


def _tokenise_in_worker(block: Block) -> _Tokenised:
    assert _worker is not None, "the pool starts every process with _start_worker"
    return _worker(block)
