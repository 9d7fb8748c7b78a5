"""Rebuilds the index and the sidecar counts of a dataset from its tokens and end-of-document ids."""

import filecmp
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Literal

import numpy as np

from megatron_prealign.data.commands.verify import verify
from megatron_prealign.data.dataset import check_workers
from megatron_prealign.data.indexed import bin_path, idx_path, index_dtype, token_dtype, write_index
from megatron_prealign.data.sidecar import Sidecar, TokenizerRecord, load_sidecar, sidecar_path, write_sidecar
from megatron_prealign.data.word_bitmap import BitmapWriter, words_path
from megatron_prealign.errors import UserError
from megatron_prealign.files.atomic import write_all_atomically, write_atomically
from megatron_prealign.files.checksum import Checksum, file_checksum
from megatron_prealign.files.sync import sync_file
from megatron_prealign.progress import Progress

TokenType = Literal["auto", "uint16", "int32"]

_READ_BYTES = 8 * 1024 * 1024
# The index stores the length of a document as int32.
_MAX_DOCUMENT_TOKENS = 2**31 - 1


@dataclass(frozen=True)
class RepairResult:
    """Result of a repair."""

    changed: bool
    """False if there was nothing to repair and nothing was written."""
    sidecar: Sidecar
    """The current sidecar."""
    backups: list[Path]
    """Backups of replaced files, and the file of removed trailing tokens."""


@dataclass(frozen=True)
class _Scan:
    """Result of reading all tokens."""

    documents: int
    tokens: int
    """Number of tokens of complete documents."""
    checksum: str
    """Checksum of the complete documents."""


def repair(
    prefix: str,
    *,
    tokenizer: str | None = None,
    language: str | None = None,
    dtype: TokenType = "auto",
    cut_tail: bool = False,
    drop_words: bool = False,
    force: bool = False,
    workers: int = 1,
    show_progress: bool = True,
) -> RepairResult:
    """Rewrites `PREFIX.idx` and the counts and checksums in `PREFIX.json`; documents end at end-of-document ids.

    Replaced files are kept as backups. If the process is killed, the command can be run again.

    Memory: about 100 MiB; document lengths are written to a temporary file in the directory of the dataset.

    Args:
        prefix: Path without extension.
        tokenizer: Tokenizer that produced the ids, for a dataset without a sidecar.
        language: Language code, for a dataset without a sidecar.
        dtype: Token dtype; "auto" takes it from the old index, else from the token count in the sidecar and the file
            size, else from the vocabulary size.
        cut_tail: Move bytes after the last complete document to `PREFIX.bin.tail`.
        drop_words: Drop the word bitmap if it cannot be kept.
        force: Rewrite even if there is nothing to repair, or if the tokens do not match their checksum.
        workers: Number of threads for verification.
        show_progress: Whether to write a progress bar to standard error.

    Raises:
        UserError: The tokens are invalid, or the content of a missing sidecar is unknown.
    """
    check_workers(workers)
    tokens = bin_path(prefix)
    if not tokens.is_file():
        raise UserError(f"{tokens}: file not found; the index can only be rebuilt from the tokens")
    sidecar, is_new = _load_or_create_sidecar(prefix, tokenizer, language)
    if not is_new and not force:
        verified = verify(prefix, workers=workers, show_progress=show_progress)
        required = {"bin", "idx"} if sidecar.segmenter is None else {"bin", "idx", "words"}
        if not verified.problems and required <= sidecar.checksums.keys():
            return RepairResult(False, sidecar, [])
    stored = _resolve_dtype(prefix, sidecar, dtype)
    if not force:
        _check_unchanged(tokens, sidecar, stored, workers)
    # An unnamed temporary file disappears even if the process is killed.
    with TemporaryFile(dir=tokens.parent) as lengths:
        scan = _scan(tokens, stored, sidecar, lengths, cut_tail, show_progress)
        cut_words = _must_cut_words(prefix, sidecar, scan.tokens, drop_words)
        same = (sidecar.documents, sidecar.tokens) == (scan.documents, scan.tokens)
        sidecar = replace(
            sidecar,
            documents=scan.documents,
            tokens=scan.tokens,
            bytes=sidecar.bytes if same else 0,
            segmenter=None if drop_words else sidecar.segmenter,
            checksums={"bin": scan.checksum},
        )
        return RepairResult(*_write(prefix, stored, sidecar, lengths, cut_words))


def _load_or_create_sidecar(prefix: str, tokenizer: str | None, language: str | None) -> tuple[Sidecar, bool]:
    """Returns the existing sidecar or a new one, and whether it is new."""
    from megatron_prealign.tokenizer.load import load_tokenizer

    path = sidecar_path(prefix)
    problem = f"{path}: file not found"
    if path.exists():
        try:
            sidecar = load_sidecar(prefix)
        except UserError as error:
            problem = str(error)
        else:
            if language is not None and language != sidecar.language:
                raise UserError(f"{path}: language is {sidecar.language}, but --language is {language}; correct one")
            if tokenizer is not None and load_tokenizer(tokenizer).fingerprint != sidecar.tokenizer.fingerprint:
                raise UserError(f"{path}: preprocessed with a tokenizer other than {tokenizer}; omit --tokenizer")
            if not sidecar.append_eod:
                raise UserError(f"{path}: append_eod is false, so document ends cannot be found; preprocess again")
            return sidecar, False
    if tokenizer is None or language is None:
        raise UserError(f"{problem}; use --tokenizer and --language to write a new one")
    opened = load_tokenizer(tokenizer)
    record = TokenizerRecord(tokenizer, opened.fingerprint, opened.vocab_size)
    return Sidecar(language=language, tokenizer=record, eod_id=opened.eod_id, documents=0, tokens=0, bytes=0), True


def _resolve_dtype(prefix: str, sidecar: Sidecar, requested: TokenType) -> np.dtype:
    """Token dtype: the requested one, else that of the old index, else the one for which the file size matches the
    token count of the sidecar, else the one that preprocess uses for the vocabulary."""
    if requested != "auto":
        dtype = np.dtype(requested)
    else:
        dtype = np.dtype(token_dtype(sidecar.tokenizer.vocab_size))
        size = bin_path(prefix).stat().st_size
        fitting = [each for each in ("uint16", "int32") if size == sidecar.tokens * np.dtype(each).itemsize]
        if len(fitting) == 1:
            dtype = np.dtype(fitting[0])
        with suppress(UserError, OSError):
            dtype = index_dtype(idx_path(prefix))
    if dtype.kind not in "iu" or sidecar.tokenizer.vocab_size - 1 > np.iinfo(dtype.name).max:
        raise UserError(
            f"{bin_path(prefix)}: the tokenizer has {sidecar.tokenizer.vocab_size:,} ids, which {dtype} cannot "
            "represent; preprocess again, or set --dtype if the tokens have another dtype"
        )
    return dtype


def _check_unchanged(tokens: Path, sidecar: Sidecar, dtype: np.dtype, workers: int) -> None:
    """Rejects tokens whose content has changed; a changed number of tokens can be repaired."""
    expected = sidecar.checksums.get("bin")
    if expected is None or tokens.stat().st_size != sidecar.tokens * dtype.itemsize:
        return
    checksum = file_checksum(tokens, workers)
    if checksum != expected:
        raise UserError(
            f"{tokens}: checksum is {checksum}, expected {expected} from the sidecar; a new index does not restore "
            "changed tokens: copy the file again, recreate the dataset, or use --force to accept its content"
        )


def _scan(
    path: Path, dtype: np.dtype, sidecar: Sidecar, lengths: IO[bytes], cut_tail: bool, show_progress: bool
) -> _Scan:
    """Reads all tokens and writes the length of every document to `lengths`, int32."""
    size = path.stat().st_size
    checksum = Checksum()
    documents = last_end = 0
    with (
        path.open("rb") as file,
        Progress("repair", size, unit="B", unit_scale=True, enabled=show_progress) as progress,
    ):
        for start in range(0, size // dtype.itemsize, _READ_BYTES // dtype.itemsize):
            data = file.read(min(_READ_BYTES, size // dtype.itemsize * dtype.itemsize - start * dtype.itemsize))
            checksum.update(data)
            ids = np.frombuffer(data, dtype=dtype)
            _check_ids(path, ids, start, dtype, sidecar)
            ends = np.flatnonzero(ids == sidecar.eod_id) + (start + 1)
            if len(ends):
                sizes = np.diff(ends, prepend=last_end)
                if sizes.max() > _MAX_DOCUMENT_TOKENS:
                    raise UserError(
                        f"{path}: got a document of {int(sizes.max()):,} tokens, at most {_MAX_DOCUMENT_TOKENS:,} are "
                        "supported"
                    )
                lengths.write(sizes.astype(np.int32).tobytes())
                documents, last_end = documents + len(ends), int(ends[-1])
            progress.update(len(data))
    tail = size - last_end * dtype.itemsize
    if documents == 0:
        raise UserError(
            f"{path}: no end-of-document id {sidecar.eod_id} found in {size:,} bytes of {dtype}; check --tokenizer and "
            "--dtype"
        )
    if tail and not cut_tail:
        partial = f"{size:,} bytes are not a multiple of {dtype}"
        reason = partial if size % dtype.itemsize else "no end-of-document id"
        raise UserError(
            f"{path}: {tail:,} bytes after the last complete document ({reason}); copy the file again, or use "
            "--cut-tail to move them to a separate file"
        )
    return _Scan(documents, last_end, _checksum_of(path, size - tail) if tail else checksum.hexdigest())


def _check_ids(path: Path, ids: np.ndarray, start: int, dtype: np.dtype, sidecar: Sidecar) -> None:
    vocab_size = sidecar.tokenizer.vocab_size
    invalid = ids >= vocab_size if dtype.kind == "u" else (ids < 0) | (ids >= vocab_size)
    if invalid.any():
        at = int(np.argmax(invalid))
        raise UserError(
            f"{path}: token {start + at:,} is {int(ids[at])}, but the tokenizer has {vocab_size:,} ids (read as "
            f"{dtype}); check --tokenizer and --dtype"
        )
    # The upper halves of small int32 values, read as uint16, are 0.
    if start == 0 and dtype.itemsize == 2 and len(ids) >= 64 and not ids[1::2].any():
        raise UserError(
            f"{path}: every second token is 0, as in int32 tokens read as uint16; set --dtype to int32 or uint16"
        )


def _checksum_of(path: Path, size: int) -> str:
    checksum = Checksum()
    with path.open("rb") as file:
        for start in range(0, size, _READ_BYTES):
            checksum.update(file.read(min(_READ_BYTES, size - start)))
    return checksum.hexdigest()


def _must_cut_words(prefix: str, sidecar: Sidecar, tokens: int, drop_words: bool) -> bool:
    """Whether the word bitmap must be truncated.

    Raises:
        UserError: It is missing or too short.
    """
    if sidecar.segmenter is None or drop_words:
        return False
    path = words_path(prefix)
    size = path.stat().st_size if path.is_file() else 0
    expected = -(-tokens // 8)
    if size < expected:
        raise UserError(
            f"{path}: got {size:,} bytes, expected {expected:,} for {tokens:,} tokens; copy it again, or use "
            "--drop-words to continue without it"
        )
    return size > expected or tokens != sidecar.tokens


def _write(
    prefix: str, dtype: np.dtype, sidecar: Sidecar, lengths: IO[bytes], cut_words: bool
) -> tuple[bool, Sidecar, list[Path]]:
    lengths.flush()
    targets = {"idx": idx_path(prefix)}
    if cut_words:
        targets["words"] = words_path(prefix)
    backups: list[Path] = []
    with write_all_atomically([*targets.values(), sidecar_path(prefix)]) as temporary:
        files = dict(zip(targets, temporary, strict=False))
        write_index(files["idx"], dtype.type, np.memmap(lengths, np.int32, "r", shape=(sidecar.documents,)))
        if cut_words:
            _cut_words(words_path(prefix), files["words"], sidecar.tokens)
        checksums = sidecar.checksums | {name: file_checksum(path) for name, path in files.items()}
        if sidecar.segmenter is not None and not cut_words:
            checksums["words"] = file_checksum(words_path(prefix))
        sidecar = replace(sidecar, checksums=checksums)
        write_sidecar(sidecar, temporary[-1])
        for old, new in zip([*targets.values(), sidecar_path(prefix)], temporary, strict=True):
            if old.exists() and not filecmp.cmp(old, new, shallow=False):
                backups.append(_back_up(old))
        backups += _cut_tokens(bin_path(prefix), sidecar.tokens * dtype.itemsize)
    return True, sidecar, backups


def _cut_words(old: Path, new: Path, tokens: int) -> None:
    writer = BitmapWriter(new)
    try:
        with old.open("rb") as stream:
            while tokens:
                packed = np.frombuffer(stream.read(min(_READ_BYTES, -(-tokens // 8))), dtype=np.uint8)
                count = min(8 * len(packed), tokens)
                writer.append_packed(packed, count)
                tokens -= count
    finally:
        writer.close()


def _cut_tokens(path: Path, size: int) -> list[Path]:
    """Moves the bytes after the first `size` to a separate file and returns its path; nothing if there are none."""
    if path.stat().st_size == size:
        return []
    tail = _unused(path.with_name(f"{path.name}.tail"))
    with path.open("rb") as file, write_atomically(tail) as temporary, temporary.open("wb") as target:
        file.seek(size)
        shutil.copyfileobj(file, target, _READ_BYTES)
    os.truncate(path, size)
    sync_file(path)
    return [tail]


def _back_up(path: Path) -> Path:
    """Links or copies a file that is about to be replaced."""
    backup = _unused(path.with_name(f"{path.name}.bak"))
    try:
        os.link(path, backup)
    except OSError:
        # The file system does not support hard links.
        with write_atomically(backup) as temporary:
            shutil.copyfile(path, temporary)
    return backup


def _unused(path: Path) -> Path:
    """Returns `path`, or the first numbered variant of it that does not exist."""
    number = 1
    candidate = path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}{number}")
    return candidate
