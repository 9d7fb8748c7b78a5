"""The directory of a run that is not finished: what was written so far, and how far that is.

A journal names the last place that is safely on the disk. Whatever happens to the process, a later run cuts the files
to what the journal says and goes on from there, or begins anew; the finished files appear under their names at the end.
"""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy

from megatron_prealign.corpus.read_errors import Problem, Problems
from megatron_prealign.data.indexed import write_index
from megatron_prealign.data.word_bitmap import BitmapWriter
from megatron_prealign.errors import UserError, write_error
from megatron_prealign.files.atomic import write_atomically
from megatron_prealign.files.checksum import Checksum, file_checksum
from megatron_prealign.files.directories import make_directories, remove_empty
from megatron_prealign.files.lock import LockHeldError, file_lock
from megatron_prealign.files.sync import sync_directory
from megatron_prealign.preprocess.tokenise import Route, TokenisedTexts

ENDING = ".unfinished"
_JOURNAL, _LOCK = "journal.json", "lock"
_FORMAT_VERSION = 1
_HASH_PIECE = 1 << 22
# Of a dataset: tokens, lengths, bits.
_FILES_A_WRITER = 3
_OTHER_FILES = 200


class UnusableRunError(UserError):
    """What an unfinished run left is damaged, so that nothing can go on from it."""


@dataclass
class Journal:
    """How far a run has come."""

    settings: dict[str, Any]
    """Everything that decides the output; another run may go on only with the same."""
    input: int = 0
    """Inputs before this one are done."""
    position: int = 0
    """Of the last block that is done in it."""
    lines: int | None = 0
    """Lines or rows of it that are done; None where nobody knows."""
    disk_bytes: int = 0
    """Bytes of all inputs that were read, for progress."""
    counted_words: int = 0
    counted_tokens: int = 0
    plain_from: str | None = None
    """From where on the plain tokenizer is used, because the fast engine gave other ids; None if it never did."""
    problems: Problems = field(default_factory=Problems)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    """The state of each `TokenWriter`."""
    is_complete: bool = False
    """All is written; only the names are missing."""


class TokenWriter:
    """The tokens, lengths and word bits of one dataset while it is made."""

    def __init__(
        self, directory: Path, number: int, route: Route, has_words: bool, state: dict[str, Any] | None
    ) -> None:
        """Opens the files with the `number` in `directory`: new ones, or cut to what `state` says.

        Raises:
            UnusableRunError: they are shorter than that.
        """
        self.route = route
        self.tokens = self.documents = self.text_bytes = 0
        self.paths = {ending: directory / f"{number}.{ending}" for ending in ("bin", "idx", "words", "json", "lengths")}
        if not has_words:
            del self.paths["words"]
        self._checksum = Checksum()
        if state is not None:
            self.tokens, self.documents, self.text_bytes = state["tokens"], state["documents"], state["text_bytes"]
            _cut(self.paths["bin"], state["bytes"])
            _cut(self.paths["lengths"], 4 * self.documents)
            if has_words:
                _cut(self.paths["words"], self.tokens // 8)
            self._take_in(self.paths["bin"])
        mode = "ab" if state is not None else "wb"
        self._bin: IO[bytes] = open(self.paths["bin"], mode)  # noqa: SIM115 - closed in `close`
        self._lengths: IO[bytes] = open(self.paths["lengths"], mode)  # noqa: SIM115 - closed in `close`
        self._words = None
        if has_words:
            self._words = BitmapWriter(self.paths["words"], None if state is None else state["bits"])

    def _take_in(self, path: Path) -> None:
        with path.open("rb") as stream:
            while piece := stream.read(_HASH_PIECE):
                self._checksum.update(piece)

    def append(self, texts: TokenisedTexts) -> None:
        """Adds documents."""
        data = texts.ids.tobytes()
        self._bin.write(data)
        self._checksum.update(data)
        self._lengths.write(texts.lengths.tobytes())
        if self._words is not None and texts.word_starts is not None:
            self._words.append(texts.word_starts)
        self.tokens += len(texts.ids)
        self.documents += len(texts.lengths)
        self.text_bytes += texts.text_bytes

    def sync(self) -> dict[str, Any]:
        """Waits until all is on the disk.

        Returns:
            What opens the files again as they are now.
        """
        streams = [self._bin, self._lengths, *([self._words.stream] if self._words is not None else [])]
        for stream in streams:
            stream.flush()
            os.fsync(stream.fileno())
        return {
            "column": self.route.column,
            "language": self.route.language,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "bytes": self._bin.tell(),
            "bits": "" if self._words is None else self._words.rest,
        }

    def finish(self, dtype: type) -> dict[str, str]:
        """Writes the index.

        Returns:
            Ending -> checksum of the finished file.
        """
        self.close()
        lengths: numpy.ndarray = numpy.zeros(0, dtype=numpy.int32)
        if self.documents:
            lengths = numpy.memmap(self.paths["lengths"], numpy.int32, "r")
        write_index(self.paths["idx"], dtype, lengths)
        sums = {"bin": self._checksum.hexdigest(), "idx": file_checksum(self.paths["idx"])}
        if "words" in self.paths:
            sums["words"] = file_checksum(self.paths["words"])
        return sums

    def close(self) -> None:
        """Closes the files, which lie as they are."""
        if self._bin.closed:
            return
        self._bin.close()
        self._lengths.close()
        if self._words is not None:
            self._words.close()


def _cut(path: Path, size: int) -> None:
    found = path.stat().st_size if path.exists() else 0
    if found < size:
        raise UnusableRunError(
            f"{path}: {found:,} bytes, expected {size:,} as the journal beside it says; remove that directory and "
            "begin "
            "anew"
        )
    os.truncate(path, size)


class Unfinished:
    """The directory `OUTPUT.unfinished`, held by one process at a time."""

    def __init__(self, output: str | Path, journal: Journal, resumed: bool) -> None:
        """For `open_unfinished`."""
        self.directory = Path(f"{output}{ENDING}")
        self.journal = journal
        self.is_kept = resumed
        """Whether there is something worth going on from."""
        self.kept_documents = sum(state["documents"] for state in journal.outputs)
        """Documents that a later run need not read again."""
        # A complete run has nothing to write any more.
        self._writers: dict[Route, TokenWriter] = {}
        self._has_words: Callable[[str], bool] = lambda language: False

    def open_writers(self, has_words: Callable[[str], bool]) -> None:
        """Opens what the journal knows; `has_words` tells which languages have a segmenter."""
        self._has_words = has_words
        for state in self.journal.outputs:
            self._open(Route(state["column"], state["language"]), state)

    @property
    def writers(self) -> list[TokenWriter]:
        """All datasets, in the order of their first text."""
        return list(self._writers.values())

    def writer(self, route: Route) -> TokenWriter:
        """The dataset of a route; a new one if it is the first text."""
        return self._writers[route] if route in self._writers else self._open(route, None)

    def _open(self, route: Route, state: dict[str, Any] | None) -> TokenWriter:
        _allow_open_files(_FILES_A_WRITER * (len(self._writers) + 1) + _OTHER_FILES)
        opened = TokenWriter(self.directory, len(self._writers), route, self._has_words(route.language), state)
        self._writers[route] = opened
        return opened

    def save(self) -> None:
        """Makes the present state the one to go on from."""
        if not self.journal.is_complete:
            self.journal.outputs = [writer.sync() for writer in self._writers.values()]
        content = {"format_version": _FORMAT_VERSION, **asdict(self.journal)}
        with write_atomically(self.directory / _JOURNAL) as temporary:
            # A file name that is not UTF-8 is kept as JSON escapes.
            temporary.write_text(json.dumps(content, ensure_ascii=False), "utf-8", errors="backslashreplace")
        self.is_kept = True
        self.kept_documents = sum(state["documents"] for state in self.journal.outputs)

    def publish(self, moves: Sequence[tuple[Path, Path]], obsolete: Sequence[Path]) -> None:
        """Gives finished and synced files their names: the moves in order, after the `obsolete` files are gone. A run
        that was killed here does it again."""
        for path in obsolete:
            path.unlink(missing_ok=True)
        if obsolete:
            sync_directory(self.directory.parent)
        for source, target in moves:
            # Gone if an earlier run was killed behind this move.
            if source.exists():
                os.replace(source, target)
        sync_directory(self.directory.parent)
        shutil.rmtree(self.directory)

    def close(self) -> None:
        """Closes all files."""
        for writer in self._writers.values():
            # What cannot be flushed any more, on a full disk, is behind the journal anyway.
            try:
                writer.close()
            except OSError:
                continue


def _allow_open_files(count: int) -> None:
    """Many systems let a process open 256 or 1,024 files until it asks for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def has_unfinished(output: str | Path) -> bool:
    """Whether there is a run to go on from."""
    return (Path(f"{output}{ENDING}") / _JOURNAL).exists()


@contextmanager
def open_unfinished(output: str | Path, settings: dict[str, Any], resume: bool) -> Iterator[Unfinished]:
    """Holds the directory of a run while it works. If nothing was saved in it by then, it is gone afterwards.

    Args:
        output: the prefix of the run's output.
        settings: see `Journal.settings`.
        resume: go on from an earlier run, if there is one.

    Raises:
        UserError: another process works in it; an earlier run lies there and `resume` is not set; that one had other
            settings.
    """
    directory = Path(f"{output}{ENDING}")
    with ExitStack() as held:
        made = _lock(directory, held)
        saved = (directory / _JOURNAL).exists()
        if saved and not resume:
            raise UserError(
                f"{directory}: an unfinished run lies here; go on from it with --resume, or remove this directory to "
                "begin "
                "anew"
            )
        journal = _load(directory / _JOURNAL, settings) if saved else Journal(settings)
        unfinished = Unfinished(output, journal, resumed=saved)
        try:
            yield unfinished
        finally:
            unfinished.close()
            if not unfinished.is_kept and directory.exists():
                shutil.rmtree(directory)
                remove_empty(made)


def _lock(directory: Path, held: ExitStack) -> list[Path]:
    """Makes and locks the directory; returns the directories that were made."""
    while True:
        try:
            made = make_directories(directory)
        except OSError as error:
            raise write_error(directory, error.errno) from error
        try:
            held.enter_context(file_lock(directory / _LOCK, wait=False))
            return made
        except FileNotFoundError:
            # Its holder finished and removed the directory between these two steps.
            continue
        except LockHeldError as error:
            output = str(directory).removesuffix(ENDING)
            raise UserError(
                f"{directory}: another process is writing {output} ({error}); wait for it, or choose another --output"
            ) from error
        except OSError as error:
            remove_empty(made)
            raise write_error(directory, error.errno) from error


def _load(path: Path, settings: dict[str, Any]) -> Journal:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, found = data.pop("format_version"), data["settings"]
        if version != _FORMAT_VERSION:
            raise ValueError(f"format version {version}, expected {_FORMAT_VERSION}")
        problems = data.pop("problems")
        journal = Journal(
            **data, problems=Problems(problems["count"], [Problem(**problem) for problem in problems["listed"]])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a journal of this version ({error}); remove the directory it lies in and begin anew"
        ) from error
    # As JSON gives them back: tuples are lists there.
    wanted = json.loads(json.dumps(settings))
    other = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    if other:
        shown = "; ".join(f"{key} was {_short(found.get(key))}, is {_short(wanted.get(key))}" for key in other)
        raise UserError(
            f"{path.parent}: the unfinished run here was another one ({shown}); give the same again, or remove this "
            "directory to begin anew"
        )
    return journal


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
