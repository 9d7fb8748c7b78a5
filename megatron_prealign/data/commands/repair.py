"""Makes the index and the sidecar's counts of a dataset again from its tokens, where documents end with one id."""

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
class Repair:
    """What a repair did."""

    changed: bool
    """False if all was well and nothing was written."""
    sidecar: Sidecar
    """The facts as they are now."""
    kept: list[Path]
    """Where what was there before lies now: old files, and the tokens that were cut off."""


@dataclass(frozen=True)
class _Scan:
    """What the tokens tell."""

    documents: int
    tokens: int
    """Those of whole documents."""
    checksum: str
    """Of the bytes of whole documents."""


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
) -> Repair:
    """Writes `PREFIX.idx` and the counts and checksums in `PREFIX.json` again, each document being what ends with an
    end-of-document id. Nothing is lost: older files are kept beside the new ones. Killed at any moment, it can be run
    again.

    Memory: about 100 MiB; the lengths of the documents go through a temporary file in the dataset's directory.

    Args:
        prefix: path without ending.
        tokenizer: the tokenizer that made the ids, for a dataset without a sidecar.
        language: its language code, for a dataset without a sidecar.
        dtype: how the tokens are stored; auto goes by the old index, else by the size that the sidecar tells, else by
            the vocabulary.
        cut_tail: move what lies behind the last whole document into `PREFIX.bin.tail`.
        drop_words: leave the marks of words out if they cannot be kept.
        force: work also if all is well, or if the tokens have changed since their checksum was taken.
        workers: threads that check.
        show_progress: whether to write a progress bar to standard error.

    Raises:
        UserError: the tokens cannot be right, or what the sidecar must say is not known.
    """
    check_workers(workers)
    tokens = bin_path(prefix)
    if not tokens.is_file():
        raise UserError(f"{tokens}: no such file; without tokens there is nothing to make an index of")
    facts, is_new = _facts(prefix, tokenizer, language)
    if not is_new and not force:
        found = verify(prefix, workers=workers, show_progress=show_progress)
        wanted = {"bin", "idx"} if facts.segmenter is None else {"bin", "idx", "words"}
        if not found.problems and wanted <= facts.checksums.keys():
            return Repair(False, facts, [])
    item = _item_type(prefix, facts, dtype)
    if not force:
        _check_unchanged(tokens, facts, item, workers)
    # What lies on the disk as if by itself goes away by itself, also if the process is killed.
    with TemporaryFile(dir=tokens.parent) as lengths:
        scan = _scan(tokens, item, facts, lengths, cut_tail, show_progress)
        words = _words_to_write(prefix, facts, scan.tokens, drop_words)
        same = (facts.documents, facts.tokens) == (scan.documents, scan.tokens)
        facts = replace(
            facts,
            documents=scan.documents,
            tokens=scan.tokens,
            bytes=facts.bytes if same else 0,
            segmenter=None if drop_words else facts.segmenter,
            checksums={"bin": scan.checksum},
        )
        return Repair(*_write(prefix, item, facts, lengths, words))


def _facts(prefix: str, tokenizer: str | None, language: str | None) -> tuple[Sidecar, bool]:
    """What the sidecar says, or what it would if there were one; and whether there is none."""
    from megatron_prealign.tokenizer.load import load_tokenizer

    path = sidecar_path(prefix)
    problem = f"{path}: no such file"
    if path.exists():
        try:
            facts = load_sidecar(prefix)
        except UserError as error:
            problem = str(error)
        else:
            if language is not None and language != facts.language:
                raise UserError(f"{path}: language is {facts.language}, --language {language}; correct one of them")
            if tokenizer is not None and load_tokenizer(tokenizer).fingerprint != facts.tokenizer.fingerprint:
                raise UserError(f"{path}: made with another tokenizer than {tokenizer}; leave --tokenizer out")
            if not facts.append_eod:
                raise UserError(f"{path}: its documents do not end with an id, so they cannot be told apart")
            return facts, False
    if tokenizer is None or language is None:
        raise UserError(f"{problem}: give --tokenizer and --language, for a new one to be written")
    opened = load_tokenizer(tokenizer)
    record = TokenizerRecord(tokenizer, opened.fingerprint, opened.vocab_size)
    return Sidecar(language=language, tokenizer=record, eod_id=opened.eod_id, documents=0, tokens=0, bytes=0), True


def _item_type(prefix: str, facts: Sidecar, given: TokenType) -> np.dtype:
    """How the tokens are stored: as the old index says, or as the sidecar's count makes the size, or as preprocess
    stores this vocabulary."""
    if given != "auto":
        item = np.dtype(given)
    else:
        item = np.dtype(token_dtype(facts.tokenizer.vocab_size))
        size = bin_path(prefix).stat().st_size
        fitting = [each for each in ("uint16", "int32") if size == facts.tokens * np.dtype(each).itemsize]
        if len(fitting) == 1:
            item = np.dtype(fitting[0])
        with suppress(UserError, OSError):
            item = index_dtype(idx_path(prefix))
    if item.kind not in "iu" or facts.tokenizer.vocab_size - 1 > np.iinfo(item.name).max:
        raise UserError(
            f"{bin_path(prefix)}: the tokenizer has {facts.tokenizer.vocab_size:,} ids, {item} cannot hold them all; "
            "preprocess again, or say --dtype if the tokens are stored otherwise"
        )
    return item


def _check_unchanged(tokens: Path, facts: Sidecar, item: np.dtype, workers: int) -> None:
    """Refuses to take changed tokens for good; tokens of another length are what a repair is for."""
    expected = facts.checksums.get("bin")
    if expected is None or tokens.stat().st_size != facts.tokens * item.itemsize:
        return
    found = file_checksum(tokens, workers)
    if found != expected:
        raise UserError(
            f"{tokens}: its checksum is {found}, expected {expected} as the sidecar says: tokens have changed, which a "
            "new index does not mend; copy or make it again, or give --force to take it as it is"
        )


def _scan(path: Path, item: np.dtype, facts: Sidecar, lengths: IO[bytes], cut_tail: bool, show_progress: bool) -> _Scan:
    """Reads all tokens and writes the length of every document to `lengths`, int32."""
    size = path.stat().st_size
    checksum = Checksum()
    documents = last_end = 0
    with (
        path.open("rb") as file,
        Progress("repair", size, unit="B", unit_scale=True, enabled=show_progress) as progress,
    ):
        for start in range(0, size // item.itemsize, _READ_BYTES // item.itemsize):
            data = file.read(min(_READ_BYTES, size // item.itemsize * item.itemsize - start * item.itemsize))
            checksum.update(data)
            ids = np.frombuffer(data, dtype=item)
            _check_ids(path, ids, start, item, facts)
            ends = np.flatnonzero(ids == facts.eod_id) + (start + 1)
            if len(ends):
                sizes = np.diff(ends, prepend=last_end)
                if sizes.max() > _MAX_DOCUMENT_TOKENS:
                    raise UserError(
                        f"{path}: a document of {int(sizes.max()):,} tokens, at most {_MAX_DOCUMENT_TOKENS:,} fit"
                    )
                lengths.write(sizes.astype(np.int32).tobytes())
                documents, last_end = documents + len(ends), int(ends[-1])
            progress.update(len(data))
    tail = size - last_end * item.itemsize
    if documents == 0:
        raise UserError(
            f"{path}: has no end-of-document id {facts.eod_id} in {size:,} bytes of {item}; is it of this tokenizer, "
            "and are its tokens stored so (--dtype)?"
        )
    if tail and not cut_tail:
        why = f"{size:,} bytes are no whole number of tokens of {item}" if size % item.itemsize else "it has no end"
        raise UserError(
            f"{path}: {tail:,} bytes lie behind the last whole document ({why}); copy it again, or give --cut-tail to "
            "move them into a file of their own"
        )
    return _Scan(documents, last_end, _checksum_of(path, size - tail) if tail else checksum.hexdigest())


def _check_ids(path: Path, ids: np.ndarray, start: int, item: np.dtype, facts: Sidecar) -> None:
    vocab_size = facts.tokenizer.vocab_size
    wrong = ids >= vocab_size if item.kind == "u" else (ids < 0) | (ids >= vocab_size)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UserError(
            f"{path}: token {start + at:,} is {int(ids[at])}, the tokenizer has {vocab_size:,} ids; is it of this "
            f"tokenizer, and are its tokens stored as {item} (--dtype)?"
        )
    # Read as 16 bits, every second half of a small 32-bit number is 0.
    if start == 0 and item.itemsize == 2 and len(ids) >= 64 and not ids[1::2].any():
        raise UserError(
            f"{path}: every second token is 0, as if they were stored as int32; say --dtype int32 or uint16"
        )


def _checksum_of(path: Path, size: int) -> str:
    checksum = Checksum()
    with path.open("rb") as file:
        for start in range(0, size, _READ_BYTES):
            checksum.update(file.read(min(_READ_BYTES, size - start)))
    return checksum.hexdigest()


def _words_to_write(prefix: str, facts: Sidecar, tokens: int, drop_words: bool) -> bool:
    """Whether the bitmap must become shorter.

    Raises:
        UserError: it is missing or already too short.
    """
    if facts.segmenter is None or drop_words:
        return False
    path = words_path(prefix)
    found = path.stat().st_size if path.is_file() else 0
    if found < -(-tokens // 8):
        raise UserError(
            f"{path}: {found:,} bytes, {tokens:,} tokens need {-(-tokens // 8):,}; copy it again, or give --drop-words "
            "to go without it"
        )
    return found > -(-tokens // 8) or tokens != facts.tokens


def _write(
    prefix: str, item: np.dtype, facts: Sidecar, lengths: IO[bytes], words: bool
) -> tuple[bool, Sidecar, list[Path]]:
    lengths.flush()
    targets = {"idx": idx_path(prefix)}
    if words:
        targets["words"] = words_path(prefix)
    kept: list[Path] = []
    with write_all_atomically([*targets.values(), sidecar_path(prefix)]) as temporary:
        files = dict(zip(targets, temporary, strict=False))
        write_index(files["idx"], item.type, np.memmap(lengths, np.int32, "r", shape=(facts.documents,)))
        if words:
            _cut_words(words_path(prefix), files["words"], facts.tokens)
        checksums = facts.checksums | {name: file_checksum(path) for name, path in files.items()}
        if facts.segmenter is not None and not words:
            checksums["words"] = file_checksum(words_path(prefix))
        facts = replace(facts, checksums=checksums)
        write_sidecar(facts, temporary[-1])
        for old, new in zip([*targets.values(), sidecar_path(prefix)], temporary, strict=True):
            if old.exists() and not filecmp.cmp(old, new, shallow=False):
                kept.append(_keep(old))
        kept += _cut_tokens(bin_path(prefix), facts.tokens * item.itemsize)
    return True, facts, kept


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
    """Moves what lies behind `size` bytes into a file of its own; gives its path if there is anything."""
    if path.stat().st_size == size:
        return []
    tail = _free(path.with_name(f"{path.name}.tail"))
    with path.open("rb") as file, write_atomically(tail) as temporary, temporary.open("wb") as target:
        file.seek(size)
        shutil.copyfileobj(file, target, _READ_BYTES)
    os.truncate(path, size)
    sync_file(path)
    return [tail]


def _keep(path: Path) -> Path:
    """A second name for a file that is about to be replaced."""
    backup = _free(path.with_name(f"{path.name}.bak"))
    try:
        os.link(path, backup)
    except OSError:
        # A file system without hard links.
        with write_atomically(backup) as temporary:
            shutil.copyfile(path, temporary)
    return backup


def _free(path: Path) -> Path:
    """The path, or the first of it with a number that is not there yet."""
    number = 1
    free = path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}{number}")
    return free
