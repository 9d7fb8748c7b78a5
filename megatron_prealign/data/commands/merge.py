"""Joins preprocessed datasets into one: the parts of a sharded run, or files that were made one by one."""

import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_prealign.corpus.read_errors import MAX_LISTED
from megatron_prealign.data.dataset import Dataset, check_output_prefix, check_workers, open_dataset
from megatron_prealign.data.indexed import bin_path, idx_path, index_bytes, write_joined_index
from megatron_prealign.data.sidecar import Sidecar, sidecar_path, write_sidecar
from megatron_prealign.data.word_bitmap import BitmapWriter, words_path
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_all_atomically
from megatron_prealign.files.checksum import Checksum, file_checksum
from megatron_prealign.files.directories import writing
from megatron_prealign.progress import Progress

# Bytes that a worker copies at a time; two pieces of each worker are in memory.
_PIECE_BYTES = 8 * 1024 * 1024
_WORDS_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class MergeResult:
    """What one merge wrote."""

    documents: int
    tokens: int
    bytes: int
    """Size of the .bin."""
    sidecar: Sidecar | None
    """As written to PREFIX.json; None for a merge without sidecars."""
    parts: list[str]
    """The inputs in the order in which they were joined."""
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
    """Writes the documents of all inputs, in their order, as one dataset with the bytes that Megatron-Core's own merge
    writes; shards of one run are put in order and give what the run without `--shard` gives.

    The files appear when all is done, or not at all. Memory: 16 MiB a worker; the index files are mapped.

    Args:
        inputs: prefixes of the datasets.
        output: prefix to write.
        workers: threads that copy.
        language: language code of the result, for inputs of different languages; None if they have one.
        drop_words: leave `.words` out, for inputs of which only some have one.
        allow_missing: take missing shards for empty ones: preprocess writes no files for a language that a shard has no
            document of.
        without_sidecar: join `.bin` and `.idx` alone, for files without `.json`; writes none.
        show_progress: whether to write a progress bar to standard error.

    Raises:
        UserError: a dataset is missing or damaged, the datasets do not fit together, shards are missing, or the disk is
            too small.
    """
    start_s = time.monotonic()
    check_workers(workers)
    check_output_prefix(output)
    if not inputs:
        raise UserError("--input is empty; expected the prefixes of two or more datasets")
    _check_distinct(inputs, output)
    if without_sidecar and (language is not None or drop_words or allow_missing):
        raise UserError("--without-sidecar joins tokens alone; leave --language, --drop-words and --allow-missing out")
    if without_sidecar and sidecar_path(output).exists():
        raise UserError(f"{sidecar_path(output)}: is there and would be of other tokens; choose another --output")
    parts = [open_dataset(prefix, sidecar=not without_sidecar) for prefix in inputs]
    _check_types(parts)
    merged = None
    if not without_sidecar:
        parts = in_order_of_shards(parts, allow_missing)
        merged = _join_sidecars(parts, language, drop_words)
    if sum(part.index.tokens for part in parts) == 0:
        raise UserError(f"all {len(parts)} inputs are empty; there is nothing to merge")
    with writing(Path(output), "dataset", kept="nothing was written"):
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
            raise UserError(f"--input {prefix} is given twice (as {seen[real]}); its documents would be there twice")
        seen[real] = prefix
    if os.path.realpath(bin_path(output)) in seen:
        raise UserError(f"--output {output} is also an input; choose another path")


def _check_types(parts: Sequence[Dataset]) -> None:
    first = parts[0]
    for part in parts:
        if part.index.modes:
            raise UserError(f"{part.index.path}: of a multimodal dataset, which cannot be merged here")
        if part.index.dtype != first.index.dtype:
            raise UserError(
                f"{part.index.path}: tokens are stored as {part.index.dtype}, those of {first.prefix} as "
                f"{first.index.dtype}; preprocess both with one tokenizer"
            )


def in_order_of_shards(parts: Sequence[Dataset], allow_missing: bool = False) -> list[Dataset]:
    """The parts as they are if none is a shard, or else all the shards of one run, in their order.

    Args:
        parts: opened with their sidecars.
        allow_missing: whether some of the shards may be missing.

    Raises:
        UserError: a shard is missing or there twice, only some parts are shards, or they are of different inputs.
    """
    shards = [(part, _shard_of(part)) for part in parts]
    if all(shard is None for _, shard in shards):
        return list(parts)
    found: dict[int, Dataset] = {}
    _, first = next((part, shard) for part, shard in shards if shard is not None)
    for part, shard in shards:
        if shard is None or shard[1] != first[1]:
            what = "is no shard" if shard is None else f"is shard {shard[0]} of {shard[1]}"
            raise UserError(
                f"{part.prefix} {what}, others are of {first[1]} shards; merge the shards of one run first, then the "
                "rest"
            )
        if shard[0] in found:
            raise UserError(
                f"{part.prefix} and {found[shard[0]].prefix} are both shard {shard[0]} of {shard[1]}; merge the shards "
                "of one run at a time"
            )
        found[shard[0]] = part
    _check_same_inputs(list(found.values()))
    missing = [number for number in range(1, first[1] + 1) if number not in found]
    if missing and not allow_missing:
        some = ", ".join(map(str, missing[:20])) + (", ..." if len(missing) > 20 else "")
        raise UserError(
            f"of {first[1]} shards {len(missing)} are missing: {some}; preprocess them (--shard i/{first[1]}) and "
            "give all, or give --allow-missing if --language-key found no document of this language in them"
        )
    return [found[number] for number in sorted(found)]


def _check_same_inputs(shards: Sequence[Dataset]) -> None:
    """Shards of two runs would leave documents out of the one and take some of the other."""
    inputs = [(part, part.sidecar.inputs) for part in shards if part.sidecar is not None]
    first, ours = inputs[0]
    for part, others in inputs:
        # Every shard names all files; their paths may differ from machine to machine.
        if [each.bytes for each in others] != [each.bytes for each in ours]:
            raise UserError(
                f"{part.prefix} is a shard of {len(others)} inputs of {sum(each.bytes for each in others):,} bytes, "
                f"{first.prefix} of {len(ours)} of {sum(each.bytes for each in ours):,}; merge the shards of one run, "
                "made of the same files"
            )


def _shard_of(part: Dataset) -> tuple[int, int] | None:
    text = None if part.sidecar is None else part.sidecar.shard
    if text is None:
        return None
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise UserError(f"{sidecar_path(part.prefix)}: shard is {text!r}, expected like 3/8; preprocess it again")
    return int(number), int(count)


def _join_sidecars(parts: Sequence[Dataset], language: str | None, drop_words: bool) -> Sidecar:
    """The facts about all parts together; counts and lists are joined, everything else must be the same."""
    facts = [part.sidecar for part in parts if part.sidecar is not None]
    first, first_path = facts[0], sidecar_path(parts[0].prefix)
    advice = {
        "tokenizer.fingerprint": "preprocess all with one tokenizer",
        "tokenizer.vocab_size": "preprocess all with one tokenizer",
        "eod_id": "preprocess all with one tokenizer",
        "append_eod": "preprocess all in one way",
        "bos": "preprocess all in one way",
        "language": "training takes the language of a dataset from its sidecar: merge one language at a time, or give "
        "--language with the code for the whole",
        "segmenter": "preprocess all with one --segmenter, or give --drop-words to leave the words out",
    }
    for part, each in zip(parts, facts, strict=True):
        for name, what in advice.items():
            if (name == "language" and language is not None) or (name == "segmenter" and drop_words):
                continue
            ours, others = _value(each, name), _value(first, name)
            if ours != others:
                raise UserError(f"{sidecar_path(part.prefix)}: {name} is {ours}, in {first_path} {others}; {what}")
    return replace(
        first,
        language=first.language if language is None else language,
        documents=sum(each.documents for each in facts),
        tokens=sum(each.tokens for each in facts),
        bytes=sum(each.bytes for each in facts),
        skipped=[problem for each in facts for problem in each.skipped][:MAX_LISTED],
        skipped_count=sum(each.skipped_count for each in facts),
        # The shards of a run name the same files.
        inputs=list(dict.fromkeys(record for each in facts for record in each.inputs)),
        segmenter=None if drop_words else first.segmenter,
        checksums={},
        engine="; ".join(dict.fromkeys(each.engine for each in facts if each.engine)),
        text_keys=list(dict.fromkeys(key for each in facts for key in each.text_keys)),
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
            f"output {output}: {needed:,} bytes are needed, {free:,} are free on its disk; free disk space or choose "
            "another disk (existing files of this name are removed only when the new ones are complete)"
        )


def _write(
    parts: Sequence[Dataset], merged: Sidecar | None, output: str, workers: int, show_progress: bool
) -> Sidecar | None:
    """Writes all files; gives the sidecar with its checksums."""
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
        write_joined_index(files["idx"], [part.index for part in parts])
        if "words" in files:
            _join_words(parts, files["words"])
        if merged is not None:
            checksums |= {name: file_checksum(path, workers) for name, path in files.items() if name != "bin"}
            merged = replace(merged, checksums=checksums)
            write_sidecar(merged, temporary[-1])
    if merged is not None and merged.segmenter is None:
        # Of the dataset that lay here before; the new sidecar does not name it.
        words_path(output).unlink(missing_ok=True)
    return merged


def _check_small_files(part: Dataset, workers: int) -> None:
    """Compares the index and the bitmap of a part with their checksums, where the sidecar has them.

    Raises:
        UserError: one differs.
    """
    if part.sidecar is None:
        return
    for name, path in (("idx", part.index.path), ("words", part.words)):
        if name in part.sidecar.checksums and (name != "words" or part.sidecar.segmenter is not None):
            _check_sum(path, file_checksum(path, workers), part.sidecar.checksums[name])


def _check_sum(path: Path, found: str, expected: str | None) -> None:
    """Raises `UserError` if a checksum that the sidecar has is not the one found."""
    if expected is not None and found != expected:
        raise UserError(
            f"{path}: its checksum is {found}, expected {expected} as the sidecar says; its content has changed, copy "
            "or make it again"
        )


@dataclass(frozen=True)
class _Piece:
    """A stretch of one part's tokens, in bytes."""

    part: int
    file: BinaryIO
    start: int
    stop: int
    target: int
    """Where it goes in the output."""
    last: bool
    """Whether it ends its part."""


def _pieces(parts: Sequence[Dataset], stack: ExitStack) -> Iterator[_Piece]:
    """The pieces of all parts. A part is opened when its turn comes: there may be more than a process can have open."""
    target = 0
    for number, part in enumerate(parts):
        size = part.index.token_bytes
        if size == 0:
            continue
        file = stack.enter_context(part.bin.open("rb", buffering=0))
        for start in range(0, size, _PIECE_BYTES):
            stop = min(start + _PIECE_BYTES, size)
            yield _Piece(number, file, start, stop, target, stop == size)
            target += stop - start


def _copy_tokens(parts: Sequence[Dataset], output: Path, workers: int, progress: Progress) -> str:
    """Copies the tokens of all parts, compares each part with its checksum and gives that of the whole.

    Workers read and write pieces at their places; only the hashing, which is faster than any disk, goes in order.
    """
    whole = Checksum()
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        with ExitStack() as stack, ThreadPoolExecutor(workers) as pool:
            waiting: deque[tuple[_Piece, Future[bytes]]] = deque()
            of_part = Checksum()

            def finish() -> None:
                nonlocal of_part
                piece, future = waiting.popleft()
                data = future.result()
                whole.update(data)
                of_part.update(data)
                progress.update(len(data))
                if piece.last:
                    piece.file.close()
                    _check_part(parts[piece.part], of_part)
                    of_part = Checksum()

            for piece in _pieces(parts, stack):
                waiting.append((piece, pool.submit(_copy, piece, target)))
                if len(waiting) >= 2 * workers:
                    finish()
            while waiting:
                finish()
    finally:
        os.close(target)
    return whole.hexdigest()


def _check_part(part: Dataset, checksum: Checksum) -> None:
    if part.sidecar is not None:
        _check_sum(part.bin, checksum.hexdigest(), part.sidecar.checksums.get("bin"))


def _copy(piece: _Piece, target: int) -> bytes:
    parts = []
    at = piece.start
    while at < piece.stop:
        try:
            data = os.pread(piece.file.fileno(), piece.stop - at, at)
        except OSError as error:
            raise UserError(f"{piece.file.name}: cannot be read at byte {at:,} ({error.strerror})") from error
        if not data:
            raise UserError(f"{piece.file.name}: became shorter while it was read; who else writes to it?")
        parts.append(data)
        at += len(data)
    whole = b"".join(parts) if len(parts) > 1 else parts[0]
    written = 0
    while written < len(whole):
        written += os.pwrite(target, memoryview(whole)[written:], piece.target + written)
    return whole


def _join_words(parts: Sequence[Dataset], output: Path) -> None:
    writer = BitmapWriter(output)
    try:
        for part in parts:
            left = part.index.tokens
            with part.words.open("rb") as stream:
                while left:
                    packed = np.frombuffer(stream.read(_WORDS_BYTES), dtype=np.uint8)
                    count = min(left, 8 * len(packed))
                    if count == 0:
                        raise UserError(f"{part.words}: became shorter while it was read; who else writes to it?")
                    writer.append_packed(packed, count)
                    left -= count
    finally:
        writer.close()
