"""Benchmark of preprocessing: speed and memory of gigatoken, of the tokenizer's own library, and of a pool that encodes
document by document, as in Megatron-LM's tool."""

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prealign.benchmark.options import PreprocessOptions
from megatron_prealign.corpus.blocks import Limits
from megatron_prealign.corpus.inputs import Input, resolve_inputs
from megatron_prealign.corpus.readers import Fields, read_documents
from megatron_prealign.data.indexed import import_indexed_dataset, token_dtype
from megatron_prealign.data.sidecar import load_sidecar
from megatron_prealign.errors import UserError
from megatron_prealign.files.checksum import file_checksum
from megatron_prealign.preprocess.run import PreprocessSettings, preprocess
from megatron_prealign.progress import Progress

MEGATRON = "megatron"
_POLL_S = 0.05
# Documents per task in Megatron-LM's tool.
_CHUNK_DOCUMENTS = 32
_BASE_WORDS = 1 << 20
_VOCABULARY = 50_000
# A new word every _NEW_WORD_BYTES, so that the benefit of an engine's word cache does not grow with the text.
_NEW_WORD_BYTES, _NEW_WORD_LETTERS = 200, 8


@dataclass(frozen=True)
class PreprocessMeasurement:
    """One implementation on one corpus."""

    implementation: str
    """`gigatoken`, `plain` or `megatron`."""
    encoded_by: str
    """Library that encoded the text."""
    workers: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents, without the surrounding JSON."""
    tokens: int
    seconds: float
    """Time from the call to the finished files, with the start of the workers but not of the measuring process."""
    peak_bytes: int
    """Peak main memory summed over all processes (shared pages count for each), sampled every 50 ms."""

    @property
    def mb_per_second(self) -> float:
        """10^6 bytes of text per second."""
        return self.text_bytes / self.seconds / 1e6

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class _Case:
    """Arguments of the measuring process."""

    implementation: str
    inputs: list[str]
    text_key: str
    tokenizer: str
    prefix: str
    workers: int
    max_document_bytes: int


class PreprocessBenchmark:
    """Measures one implementation after the other, each in its own process."""

    def __init__(self, options: PreprocessOptions) -> None:
        self._options = options

    def measure(self) -> Iterator[PreprocessMeasurement]:
        """Yields the measurements as soon as they are available.

        Raises:
            UserError: an input or the tokenizer is not usable, or two implementations wrote different tokens.
        """
        options = self._options
        with tempfile.TemporaryDirectory(prefix="prealign-benchmark-", dir=options.directory) as directory:
            inputs = [str(path) for path in options.input] or [str(_write_corpus(Path(directory), options))]
            tokenizer = options.tokenizer or str(_train_tokenizer(Path(directory), inputs, options.text_key))
            sources = resolve_inputs(inputs)
            checksum = None
            for name in options.implementation:
                # Megatron is slow and only gets the first part of the corpus.
                case_inputs = (
                    [str(_write_first_part(Path(directory), sources, options))] if name == MEGATRON else inputs
                )
                prefix = str(Path(directory) / name)
                max_document_bytes = 4 * max(options.document_bytes[1], 1 << 20)
                case = _Case(
                    name, case_inputs, options.text_key, tokenizer, prefix, options.workers, max_document_bytes
                )
                yield self._measure(case)
                actual = file_checksum(Path(f"{prefix}.bin"))
                expected = _expected_checksum(case) if name == MEGATRON else checksum
                if expected is not None and actual != expected:
                    raise UserError(
                        f"{name} wrote different tokens than the other implementations; ignore its measurement above"
                    )
                checksum = checksum if name == MEGATRON else actual
                for path in Path(directory).glob(f"{name}.*"):
                    path.unlink()

    def _measure(self, case: _Case) -> PreprocessMeasurement:
        needed = 4 * sum(source.bytes for source in resolve_inputs(case.inputs))
        free = shutil.disk_usage(Path(case.prefix).parent).free
        if free < needed:
            raise UserError(
                f"{Path(case.prefix).parent}: {free:,} bytes free, expected at least {needed:,}; choose another "
                "--directory"
            )
        return _run_in_subprocess(case)


def _expected_checksum(case: _Case) -> str:
    """Checksum of the file that Megatron-LM's tool should have written."""
    plain = replace(case, implementation="plain", prefix=f"{case.prefix}.expected", workers=1)
    _measure_preprocess(plain)
    return file_checksum(Path(f"{plain.prefix}.bin"))


def _write_corpus(directory: Path, options: PreprocessOptions) -> Path:
    """Writes documents of Zipf-distributed words with log-uniform lengths."""
    path = directory / "corpus.jsonl"
    generator = np.random.default_rng(options.seed)
    base = _base_text(generator)
    shortest, longest = options.document_bytes
    total, written = int(options.mb * 1e6), 0
    with path.open("wb") as stream, Progress("write text", total, unit="B", unit_scale=True) as progress:
        while written < total:
            sizes = np.exp(generator.uniform(np.log(shortest), np.log(longest), 256)).astype(np.int64)
            for size in sizes.tolist():
                line = b'{"text": "%s"}\n' % _document(base, size, generator)
                stream.write(line)
                written += len(line)
                progress.update(len(line))
                if written >= total:
                    break
    return path


def _base_text(generator: np.random.Generator) -> bytes:
    lengths = generator.integers(2, 12, _VOCABULARY)
    letters = generator.integers(ord("a"), ord("z") + 1, int(lengths.sum()), dtype=np.uint8).tobytes()
    ends = np.cumsum(lengths).tolist()
    words = [letters[end - length : end] for end, length in zip(ends, lengths.tolist(), strict=True)]
    drawn = np.minimum(generator.zipf(1.3, _BASE_WORDS) - 1, _VOCABULARY - 1).tolist()
    return b" ".join([words[number] for number in drawn])


def _document(base: bytes, size: int, generator: np.random.Generator) -> bytes:
    pieces = max(size // _NEW_WORD_BYTES, 1)
    length = min(size, _NEW_WORD_BYTES)
    new = generator.integers(ord("a"), ord("z") + 1, pieces * _NEW_WORD_LETTERS, dtype=np.uint8).tobytes()
    parts: list[bytes] = []
    for number, at in enumerate(generator.integers(0, len(base) - length, pieces).tolist()):
        parts += [base[at : at + length], new[number * _NEW_WORD_LETTERS :][:_NEW_WORD_LETTERS]]
    # At least one letter, wherever the document was cut.
    return b" ".join(parts)[: max(size, 1)].replace(b"  ", b" ").strip() or b"a"


def _train_tokenizer(directory: Path, inputs: Sequence[str], text_key: str) -> Path:
    from megatron_prealign.preprocess.train_tokenizer import TrainerSettings, train_tokenizer

    train_tokenizer(
        inputs,
        directory / "tokenizer",
        4096,
        text_keys=(text_key,),
        show_progress=False,
        settings=TrainerSettings(sample_bytes=4_000_000),
    )
    return directory / "tokenizer"


def _write_first_part(directory: Path, sources: Sequence[Input], options: PreprocessOptions) -> Path:
    """Writes the start of the corpus as JSON lines, the only format that Megatron-LM's tool reads."""
    path = directory / "part.jsonl"
    remaining = int(options.megatron_mb * 1e6)
    limits = Limits(document_bytes=4 * max(options.document_bytes[1], 1 << 20))
    with path.open("w", encoding="utf-8") as stream:
        for text, _ in read_documents(sources, (options.text_key,), "skip", limits=limits):
            stream.write(json.dumps({options.text_key: text}, ensure_ascii=False) + "\n")
            remaining -= len(text)
            if remaining <= 0:
                break
    return path


def _run_in_subprocess(case: _Case) -> PreprocessMeasurement:
    import psutil

    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(case, sender))
    process.start()
    sender.close()
    peak = 0
    while process.is_alive() and not receiver.poll(_POLL_S):
        with suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            peak = max(peak, sum(_resident(each) for each in [parent, *parent.children(recursive=True)]))
    try:
        result = receiver.recv()
    except EOFError as error:
        raise UserError(
            f"{case.implementation}: the measuring process died (out of memory?); use less text or fewer --workers"
        ) from error
    finally:
        process.join()
    if isinstance(result, UserError):
        raise result
    return PreprocessMeasurement(case.implementation, peak_bytes=peak, workers=case.workers, **result)


def _resident(process: Any) -> int:
    import psutil

    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _run(case: _Case, sender: Connection) -> None:
    try:
        sender.send(_measure_megatron(case) if case.implementation == MEGATRON else _measure_preprocess(case))
    except UserError as error:
        sender.send(error)


def _measure_preprocess(case: _Case) -> dict[str, Any]:
    settings = PreprocessSettings(
        language="en",
        fields=Fields((case.text_key,)),
        workers=case.workers,
        use_fast_engine=case.implementation == "gigatoken",
        limits=Limits(document_bytes=case.max_document_bytes),
    )
    start = time.perf_counter()
    preprocess(case.inputs, case.tokenizer, case.prefix, settings, show_progress=False)
    seconds = time.perf_counter() - start
    sidecar = load_sidecar(case.prefix)
    return {
        "encoded_by": sidecar.engine,
        "documents": sidecar.documents,
        "text_bytes": sidecar.bytes,
        "tokens": sidecar.tokens,
        "seconds": seconds,
    }


class _Encoder:
    """Encodes lines in a worker process, with a tokenizer loaded by Megatron-Core."""

    tokenizer: Any = None

    def __init__(self, path: str, text_key: str) -> None:
        self._path, self._text_key = path, text_key

    def start(self) -> None:
        _Encoder.tokenizer = _megatron_tokenizer(self._path)

    def __call__(self, line: str) -> tuple[list[int], int]:
        text = json.loads(line)[self._text_key]
        ids = list(_Encoder.tokenizer.tokenize(text))
        return [*ids, _Encoder.tokenizer.eod], len(text.encode())


def _megatron_tokenizer(path: str) -> Any:
    # Suppresses warnings of Megatron-Core on a CPU.
    import_indexed_dataset()
    from megatron.core.tokenizers import MegatronTokenizer

    library = "huggingface" if Path(path).is_dir() else "sentencepiece"
    return MegatronTokenizer.from_pretrained(tokenizer_path=path, metadata_path={"library": library})


def _measure_megatron(case: _Case) -> dict[str, Any]:
    """Does what Megatron-LM's tool does: `Pool.imap` over lines, Megatron-Core's tokenizer and its builder."""
    indexed = import_indexed_dataset()
    encoder = _Encoder(case.tokenizer, case.text_key)
    vocabulary = _megatron_tokenizer(case.tokenizer).vocab_size
    documents = text_bytes = tokens = 0
    (path,) = case.inputs
    # Megatron-LM's tool starts its workers before its clock, so the same is done here.
    with multiprocessing.get_context("spawn").Pool(case.workers, initializer=encoder.start) as pool:
        pool.map(len, [""] * case.workers)
        start = time.perf_counter()
        builder = indexed.IndexedDatasetBuilder(f"{case.prefix}.bin", dtype=token_dtype(vocabulary))
        with open(path, encoding="utf-8") as stream:
            for ids, size in pool.imap(encoder, stream, _CHUNK_DOCUMENTS):
                builder.add_document(ids, [len(ids)])
                documents, text_bytes, tokens = documents + 1, text_bytes + size, tokens + len(ids)
        builder.finalize(f"{case.prefix}.idx")
        seconds = time.perf_counter() - start
    return {
        "encoded_by": "Megatron-Core",
        "documents": documents,
        "text_bytes": text_bytes,
        "tokens": tokens,
        "seconds": seconds,
    }
