"""Merges preprocessed datasets: the shards of a preprocess run, or datasets that were made separately."""

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_prealign.corpus.read_errors import MAX_LISTED
from megatron_prealign.data.dataset import Dataset, check_output_prefix, check_workers, open_dataset
from megatron_prealign.data.indexed import bin_path, idx_path, index_bytes, write_merged_index
from megatron_prealign.data.sidecar import Sidecar, sidecar_path, write_sidecar
from megatron_prealign.data.word_bitmap import BitmapWriter, words_path
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_all_atomically
from megatron_prealign.files.checksum import Checksum, file_checksum
from megatron_prealign.files.directories import writing
from megatron_prealign.files.threads import stoppable_threads
from megatron_prealign.progress import Progress

# Chunk size of the copy; two chunks per worker are in memory.
_CHUNK_BYTES = 8 * 1024 * 1024
_WORDS_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class MergeResult:
    """Result of a merge."""

    documents: int
    tokens: int
    bytes: int
    """Size of the .bin in bytes."""
    sidecar: Sidecar | None
    """Content of PREFIX.json; None for a merge without sidecars."""
    parts: list[str]
    """Input prefixes in merge order."""
    seconds: float


def merge(
    inputs: Sequence[str],
    output: str,
    *,
    workers: int = 1,
    language: str | None = None,
    drop_words: bool = False,
    allow_missing: bool = False,
    without_sidecar: bool = False,
    show_progress: bool = True,
) -> MergeResult:
    """Writes the documents of all inputs, in order, as one dataset, byte-identical to Megatron-Core's own merge.

    Shards of a preprocess run are sorted; the result equals that of the run without `--shard`. The output is written
    atomically. Memory: 16 MiB per worker; index files are memory-mapped.

    Args:
        inputs: Prefixes of the datasets.
        output: Output prefix.
        workers: Number of threads that copy.
        language: Language code of the result, for inputs with different languages; None if they all have the same.
        drop_words: Omit `.words`, for inputs of which only some have one.
        allow_missing: Treat missing shards as empty: preprocess writes no files for a language without documents in a
            shard.
        without_sidecar: Merge only `.bin` and `.idx`; `.json` files are neither read nor written.
        show_progress: Whether to write a progress bar to standard error.

    Raises:
        UserError: A dataset is missing or corrupt, the datasets are incompatible, shards are missing, or there is not
            enough disk space.
    """
    start_s = time.monotonic()
    check_workers(workers)
    check_output_prefix(output)
    if not inputs:
        raise UserError("--input is empty; expected the prefixes of two or more datasets")
    _check_distinct(inputs, output)
    if without_sidecar and (language is not None or drop_words or allow_missing):
        raise UserError("--without-sidecar cannot be combined with --language, --drop-words or --allow-missing")
    if without_sidecar and sidecar_path(output).exists():
        raise UserError(
            f"{sidecar_path(output)} already exists and would not match the output; choose another --output"
        )
    parts = [open_dataset(prefix, sidecar=not without_sidecar) for prefix in inputs]
    _check_dtypes(parts)
    merged = None
    if not without_sidecar:
        parts = sort_shards(parts, allow_missing)
        merged = _merge_sidecars(parts, language, drop_words)
    if sum(part.index.tokens for part in parts) == 0:
        raise UserError(f"all {len(parts)} inputs are empty; there is nothing to merge")
    with writing(Path(output), "dataset", note="nothing was written"):
        _check_space(parts, output, words=merged is not None and merged.segmenter is not None)
        merged = _write(parts, merged, output, workers, show_progress)
    return MergeResult(
        documents=sum(part.index.documents for part in parts),
        tokens=sum(part.index.tokens for part in parts),
        bytes=sum(part.index.token_bytes for part in parts),
        sidecar=merged,
        parts=[part.prefix for part in parts],
        seconds=time.monotonic() - start_s,
    )


def _check_distinct(inputs: Sequence[str], output: str) -> None:
    seen: dict[str, str] = {}
    for prefix in inputs:
        real = os.path.realpath(bin_path(prefix))
        if real in seen:
            raise UserError(
                f"--input {prefix} is listed twice (also as {seen[real]}); its documents would be duplicated"
            )
        seen[real] = prefix
    if os.path.realpath(bin_path(output)) in seen:
        raise UserError(f"--output {output} is also an input; choose another path")


def _check_dtypes(parts: Sequence[Dataset]) -> None:
    first = parts[0]
    for part in parts:
        if part.index.multimodal:
            raise UserError(f"{part.index.path}: merging multimodal datasets is not supported")
        if part.index.dtype != first.index.dtype:
            raise UserError(
                f"{part.index.path}: token dtype is {part.index.dtype}, expected {first.index.dtype} as in "
                f"{first.prefix}; preprocess both with the same tokenizer"
            )


def sort_shards(parts: Sequence[Dataset], allow_missing: bool = False) -> list[Dataset]:
    """Sorts the shards of a preprocess run; parts without shards are returned unchanged.

    Args:
        parts: Datasets opened with their sidecars.
        allow_missing: Whether shards may be missing.

    Raises:
        UserError: A shard is missing or duplicated, only some parts are shards, or shards have different inputs.
    """
    shards = [(part, _shard_of(part)) for part in parts]
    if all(shard is None for _, shard in shards):
        return list(parts)
    by_number: dict[int, Dataset] = {}
    _, first = next((part, shard) for part, shard in shards if shard is not None)
    for part, shard in shards:
        if shard is None or shard[1] != first[1]:
            what = "is not a shard" if shard is None else f"is shard {shard[0]} of {shard[1]}"
            raise UserError(
                f"{part.prefix} {what}, but other inputs are shards of {first[1]}; merge the shards of one run first, "
                "then the rest"
            )
        if shard[0] in by_number:
            raise UserError(
                f"{part.prefix} and {by_number[shard[0]].prefix} are both shard {shard[0]} of {shard[1]}; merge the "
                "shards of one run at a time"
            )
        by_number[shard[0]] = part
    _check_same_inputs(list(by_number.values()))
    missing = [number for number in range(1, first[1] + 1) if number not in by_number]
    if missing and not allow_missing:
        listed = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise UserError(
            f"{len(missing)} of {first[1]} shards are missing: {listed}; preprocess them (--shard i/{first[1]}) and "
            "pass all, or use --allow-missing if --language-key found no documents of this language in them"
        )
    return [by_number[number] for number in sorted(by_number)]


def _check_same_inputs(shards: Sequence[Dataset]) -> None:
    """Rejects shards of different runs, which would lose some documents and duplicate others."""
    inputs = [(part, part.sidecar.inputs) for part in shards if part.sidecar is not None]
    first, expected = inputs[0]
    for part, records in inputs:
        # Every shard lists all files; their paths may differ between machines.
        if [each.bytes for each in records] != [each.bytes for each in expected]:
            raise UserError(
                f"{part.prefix} is a shard of {len(records)} inputs of {sum(each.bytes for each in records):,} bytes, "
                f"but {first.prefix} of {len(expected)} inputs of {sum(each.bytes for each in expected):,} bytes; "
                "merge shards of the same run and files"
            )


def _shard_of(part: Dataset) -> tuple[int, int] | None:
    text = None if part.sidecar is None else part.sidecar.shard
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(
            f"{sidecar_path(part.prefix)}: shard is {text!r}, expected a value such as 3/8; preprocess it again"
        )
    return int(number), int(count)


def _merge_sidecars(parts: Sequence[Dataset], language: str | None, drop_words: bool) -> Sidecar:
    """Combines the sidecars of all parts; counts are added and lists concatenated, all other fields must be equal."""
    sidecars = [part.sidecar for part in parts if part.sidecar is not None]
    first, first_path = sidecars[0], sidecar_path(parts[0].prefix)
    advice = {
        "tokenizer.fingerprint": "preprocess all with the same tokenizer",
        "tokenizer.vocab_size": "preprocess all with the same tokenizer",
        "eod_id": "preprocess all with the same tokenizer",
        "append_eod": "preprocess all with the same options",
        "bos": "preprocess all with the same options",
        "language": "training reads the language of a dataset from its sidecar: merge one language at a time, or set "
        "--language for the merged dataset",
        "segmenter": "preprocess all with the same --segmenter, or use --drop-words to omit the word bitmap",
    }
    for part, each in zip(parts, sidecars, strict=True):
        for name, action in advice.items():
            if (name == "language" and language is not None) or (name == "segmenter" and drop_words):
                continue
            got, expected = _value(each, name), _value(first, name)
            if got != expected:
                raise UserError(
                    f"{sidecar_path(part.prefix)}: {name} is {got}, expected {expected} as in {first_path}; {action}"
                )
    return replace(
        first,
        language=first.language if language is None else language,
        documents=sum(each.documents for each in sidecars),
        tokens=sum(each.tokens for each in sidecars),
        bytes=sum(each.bytes for each in sidecars),
        skipped=[problem for each in sidecars for problem in each.skipped][:MAX_LISTED],
        skipped_count=sum(each.skipped_count for each in sidecars),
        # The shards of a run list the same files.
        inputs=list(dict.fromkeys(record for each in sidecars for record in each.inputs)),
        segmenter=None if drop_words else first.segmenter,
        checksums={},
        engine="; ".join(dict.fromkeys(each.engine for each in sidecars if each.engine)),
        text_keys=list(dict.fromkeys(key for each in sidecars for key in each.text_keys)),
        shard=None,
    )


def _value(sidecar: Sidecar, name: str) -> object:
    value: object = sidecar
    for each in name.split("."):
        value = getattr(value, each)
    return value


def _check_space(parts: Sequence[Dataset], output: str, words: bool) -> None:
    tokens = sum(part.index.token_bytes for part in parts)
    sequences = sum(part.index.sequences for part in parts)
    documents = sum(part.index.documents for part in parts)
    needed = tokens + index_bytes(sequences, documents + 1)
    if words:
        needed += sum(part.index.tokens for part in parts) // 8 + 1
    free = shutil.disk_usage(Path(output).parent).free
    if free < needed:
        raise UserError(
            f"output {output}: needs {needed:,} bytes, but its disk has {free:,} free; free disk space or choose "
            "another disk (existing output is removed only after the new files are complete)"
        )


def _write(
    parts: Sequence[Dataset], merged: Sidecar | None, output: str, workers: int, show_progress: bool
) -> Sidecar | None:
    """Writes all files and returns the sidecar with checksums."""
    targets = {"bin": bin_path(output), "idx": idx_path(output)}
    if merged is not None and merged.segmenter is not None:
        targets["words"] = words_path(output)
    paths = [*targets.values(), *([sidecar_path(output)] if merged is not None else [])]
    total = sum(part.index.token_bytes for part in parts)
    with (
        write_all_atomically(paths) as temporary,
        Progress("merge", total, unit="B", unit_scale=True, enabled=show_progress) as progress,
    ):
        files = dict(zip(targets, temporary, strict=False))
        for part in parts:
            _check_small_files(part, workers)
        checksums = {"bin": _copy_tokens(parts, files["bin"], workers, progress)}
        write_merged_index(files["idx"], [part.index for part in parts])
        if "words" in files:
            _merge_words(parts, files["words"])
        if merged is not None:
            checksums |= {name: file_checksum(path, workers) for name, path in files.items() if name != "bin"}
            merged = replace(merged, checksums=checksums)
            write_sidecar(merged, temporary[-1])
    if merged is not None and merged.segmenter is None:
        # Left over from a replaced dataset; the new sidecar does not list it.
        words_path(output).unlink(missing_ok=True)
    return merged


def _check_small_files(part: Dataset, workers: int) -> None:
    """Compares the index and the word bitmap of a part with the checksums in its sidecar, if any.

    Raises:
        UserError: A checksum differs.
    """
    if part.sidecar is None:
        return
    for name, path in (("idx", part.index.path), ("words", part.words)):
        if name in part.sidecar.checksums and (name != "words" or part.sidecar.segmenter is not None):
            _check_checksum(path, file_checksum(path, workers), part.sidecar.checksums[name])


def _check_checksum(path: Path, checksum: str, expected: str | None) -> None:
    """Raises `UserError` if the checksum differs from the one in the sidecar, if any."""
    if expected is not None and checksum != expected:
        raise UserError(
            f"{path}: checksum is {checksum}, expected {expected} from the sidecar; the content has changed, "
            "copy the file again or recreate the dataset"
        )


@dataclass(frozen=True)
class _Chunk:
    """A byte range of the tokens of a part."""

    part: int
    file: BinaryIO
    start: int
    stop: int
    target: int
    """Byte offset in the output."""
    last: bool
    """Whether it is the last chunk of its part."""


def _chunks(parts: Sequence[Dataset], stack: ExitStack) -> Iterator[_Chunk]:
    """Yields the chunks of all parts. Files are opened one at a time: there may be more than a process can open."""
    target = 0
    for number, part in enumerate(parts):
        size = part.index.token_bytes
        if size == 0:
            continue
        file = stack.enter_context(part.bin.open("rb", buffering=0))
        for start in range(0, size, _CHUNK_BYTES):
            stop = min(start + _CHUNK_BYTES, size)
            yield _Chunk(number, file, start, stop, target, stop == size)
            target += stop - start


def _copy_tokens(parts: Sequence[Dataset], output: Path, workers: int, progress: Progress) -> str:
    """Copies the tokens of all parts, verifies the checksum of each part and returns the checksum of the output.

    Workers copy chunks in parallel; only hashing, which is faster than any disk, is sequential.
    """
    total = Checksum()
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with ExitStack() as stack, stoppable_threads(workers) as (pool, _):
            waiting: deque[tuple[_Chunk, Future[bytes]]] = deque()
            part_checksum = Checksum()

            def finish() -> None:
                nonlocal part_checksum
                chunk, future = waiting.popleft()
                data = future.result()
                total.update(data)
                part_checksum.update(data)
                progress.update(len(data))
                if chunk.last:
                    chunk.file.close()
                    _check_part(parts[chunk.part], part_checksum)
                    part_checksum = Checksum()

            for chunk in _chunks(parts, stack):
                waiting.append((chunk, pool.submit(_copy, chunk, target)))
                if len(waiting) >= 2 * workers:
                    finish()
            while waiting:
                finish()
    finally:
        os.close(target)
    return total.hexdigest()


def _check_part(part: Dataset, checksum: Checksum) -> None:
    if part.sidecar is not None:
        _check_checksum(part.bin, checksum.hexdigest(), part.sidecar.checksums.get("bin"))


def _copy(chunk: _Chunk, target: int) -> bytes:
    reads = []
    at = chunk.start
    while at < chunk.stop:
        try:
            data = os.pread(chunk.file.fileno(), chunk.stop - at, at)
        except OSError as error:
            raise UserError(f"cannot read {chunk.file.name} at byte {at:,}: {error.strerror}") from error
        if not data:
            raise UserError(f"{chunk.file.name}: shrank while it was read; is another process writing to it?")
        reads.append(data)
        at += len(data)
    content = b"".join(reads) if len(reads) > 1 else reads[0]
    written = 0
    while written < len(content):
        written += os.pwrite(target, memoryview(content)[written:], chunk.target + written)
    return content


def _merge_words(parts: Sequence[Dataset], output: Path) -> None:
    writer = BitmapWriter(output)
    try:
        for part in parts:
            remaining = part.index.tokens
            with part.words.open("rb") as stream:
                while remaining:
                    packed = np.frombuffer(stream.read(_WORDS_BYTES), dtype=np.uint8)
                    count = min(remaining, 8 * len(packed))
                    if count == 0:
                        raise UserError(f"{part.words}: shrank while it was read; is another process writing to it?")
                    writer.append_packed(packed, count)
                    remaining -= count
    finally:
        writer.close()
