"""Preprocessing: text a second, tokens a second and memory, of gigatoken, of the tokenizer's own library, and of one
document after the other through a pool, as Megatron-LM's tool does it."""

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
# Documents that Megatron-LM's tool gives a worker at a time.
_CHUNK_DOCUMENTS = 32
_BASE_WORDS = 1 << 20
_VOCABULARY = 50_000
# A word that was never there before, every so many bytes: what engines keep of words must not grow with the text.
_NEW_WORD_BYTES, _NEW_WORD_LETTERS = 200, 8


@dataclass(frozen=True)
class PreprocessMeasurement:
    """One implementation on one corpus."""

    implementation: str
    """`gigatoken`, `plain` or `megatron`."""
    encoded_by: str
    """Which library encoded."""
    workers: int
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents, without the JSON around them."""
    tokens: int
    seconds: float
    """From the call to the finished files, the start of the workers included; not that of the measuring process."""
    peak_bytes: int
    """Most main memory of all processes together, pages that several share counted once for each; every 50 ms."""

    @property
    def mb_per_second(self) -> float:
        """10^6 bytes of text a second."""
        return self.text_bytes / self.seconds / 1e6

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class _Case:
    """What the measuring process is told."""

    implementation: str
    inputs: list[str]
    text_key: str
    tokenizer: str
    prefix: str
    workers: int
    longest_document: int


class PreprocessBenchmark:
    """Measures one implementation after the other, each in a process of its own."""

    def __init__(self, options: PreprocessOptions) -> None:
        self._options = options

    def measure(self) -> Iterator[PreprocessMeasurement]:
        """The measurements, as they come.

        Raises:
            UserError: an unusable input or tokenizer; two implementations wrote different tokens.
        """
        options = self._options
        with tempfile.TemporaryDirectory(prefix="prealign-benchmark-", dir=options.directory) as directory:
            inputs = [str(path) for path in options.input] or [str(_write_corpus(Path(directory), options))]
            tokenizer = options.tokenizer or str(_train(Path(directory), inputs, options.text_key))
            sources = resolve_inputs(inputs)
            checksum = None
            for name in options.implementation:
                # The slow one gets the beginning of the corpus.
                used = [str(_part(Path(directory), sources, options))] if name == MEGATRON else inputs
                prefix = str(Path(directory) / name)
                longest = 4 * max(options.document_bytes[1], 1 << 20)
                case = _Case(name, used, options.text_key, tokenizer, prefix, options.workers, longest)
                yield self._measure(case)
                found = file_checksum(Path(f"{prefix}.bin"))
                expected = _checksum_of_part(case) if name == MEGATRON else checksum
                if expected is not None and found != expected:
                    raise UserError(f"{name} wrote other tokens than the others; its figures above mean nothing")
                checksum = checksum if name == MEGATRON else found
                for path in Path(directory).glob(f"{name}.*"):
                    path.unlink()

    def _measure(self, case: _Case) -> PreprocessMeasurement:
        needed = 4 * sum(source.bytes for source in resolve_inputs(case.inputs))
        free = shutil.disk_usage(Path(case.prefix).parent).free
        if free < needed:
            raise UserError(
                f"{Path(case.prefix).parent}: {free:,} bytes free, up to {needed:,} are needed; choose another "
                "--directory"
            )
        return _run_apart(case)


def _checksum_of_part(case: _Case) -> str:
    """What Megatron-LM's tool should have written."""
    again = replace(case, implementation="plain", prefix=f"{case.prefix}.expected", workers=1)
    _measure_ours(again)
    return file_checksum(Path(f"{again.prefix}.bin"))


def _write_corpus(directory: Path, options: PreprocessOptions) -> Path:
    """Documents of words by Zipf's law, their lengths spread evenly over orders of magnitude."""
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
    # At least one letter, wherever it was cut.
    return b" ".join(parts)[: max(size, 1)].replace(b"  ", b" ").strip() or b"a"


def _train(directory: Path, inputs: Sequence[str], text_key: str) -> Path:
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


def _part(directory: Path, sources: Sequence[Input], options: PreprocessOptions) -> Path:
    """The beginning of the corpus as plain lines, which is all that Megatron-LM's tool reads."""
    path = directory / "part.jsonl"
    left = int(options.megatron_mb * 1e6)
    limits = Limits(document_bytes=4 * max(options.document_bytes[1], 1 << 20))
    with path.open("w", encoding="utf-8") as stream:
        for text, _ in read_documents(sources, (options.text_key,), "skip", limits=limits):
            stream.write(json.dumps({options.text_key: text}, ensure_ascii=False) + "\n")
            left -= len(text)
            if left <= 0:
                break
    return path


def _run_apart(case: _Case) -> PreprocessMeasurement:
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
        found = receiver.recv()
    except EOFError as error:
        raise UserError(
            f"{case.implementation}: the measuring process died (out of memory?); give less text or fewer --workers"
        ) from error
    finally:
        process.join()
    if isinstance(found, UserError):
        raise found
    return PreprocessMeasurement(case.implementation, peak_bytes=peak, workers=case.workers, **found)


def _resident(process: Any) -> int:
    import psutil

    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def _run(case: _Case, sender: Connection) -> None:
    try:
        sender.send(_measure_megatron(case) if case.implementation == MEGATRON else _measure_ours(case))
    except UserError as error:
        sender.send(error)


def _measure_ours(case: _Case) -> dict[str, Any]:
    settings = PreprocessSettings(
        language="en",
        fields=Fields((case.text_key,)),
        workers=case.workers,
        use_fast_engine=case.implementation == "gigatoken",
        limits=Limits(document_bytes=case.longest_document),
    )
    start = time.perf_counter()
    preprocess(case.inputs, case.tokenizer, case.prefix, settings, show_progress=False)
    seconds = time.perf_counter() - start
    facts = load_sidecar(case.prefix)
    return {
        "encoded_by": facts.engine,
        "documents": facts.documents,
        "text_bytes": facts.bytes,
        "tokens": facts.tokens,
        "seconds": seconds,
    }


class _Encoder:
    """Of one worker: a tokenizer as Megatron-Core loads it."""

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
    # Without the warnings that Megatron-Core gives on a CPU.
    import_indexed_dataset()
    from megatron.core.tokenizers import MegatronTokenizer

    library = "huggingface" if Path(path).is_dir() else "sentencepiece"
    return MegatronTokenizer.from_pretrained(tokenizer_path=path, metadata_path={"library": library})


def _measure_megatron(case: _Case) -> dict[str, Any]:
    """Megatron-LM's tool in its own parts: `Pool.imap` over lines, Megatron-Core's tokenizer and its builder."""
    indexed = import_indexed_dataset()
    encoder = _Encoder(case.tokenizer, case.text_key)
    vocabulary = _megatron_tokenizer(case.tokenizer).vocab_size
    documents = text_bytes = tokens = 0
    (path,) = case.inputs
    # It starts its workers before it reads its clock.
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
