"""Directory of an unfinished run: its partial output files and a journal of its progress.

The journal records the last position that is safely on disk. After any failure, a later run truncates the files to that
position and continues from it, or starts from scratch. Finished files get their final names at the end.
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

SUFFIX = ".unfinished"
_JOURNAL, _LOCK = "journal.json", "lock"
_FORMAT_VERSION = 1
_HASH_PIECE = 1 << 22
# Per dataset: tokens, lengths, word bits.
_FILES_A_WRITER = 3
_OTHER_FILES = 200


class UnusableRunError(UserError):
    """The files of an unfinished run are corrupt and cannot be resumed from."""


@dataclass
class Journal:
    """Progress of a run."""

    settings: dict[str, Any]
    """Everything that affects the output; a run can resume only with equal settings."""
    input: int = 0
    """Index of the current input."""
    position: int = 0
    """Position after its last finished block."""
    lines: int | None = 0
    """Number of its finished lines or rows; None if unknown."""
    disk_bytes: int = 0
    """Bytes read from all inputs, for the progress display."""
    counted_words: int = 0
    counted_tokens: int = 0
    plain_from: str | None = None
    """Location from which the plain tokenizer is used because the fast engine produced different ids; None if never."""
    problems: Problems = field(default_factory=Problems)
    outputs: list[dict[str, Any]] = field(default_factory=list)
    """State of each `TokenWriter`."""
    is_complete: bool = False
    """Whether everything is written and only the renames are missing."""


class TokenWriter:
    """Writes the tokens, lengths and word bits of one dataset."""

    def __init__(
        self, directory: Path, number: int, route: Route, has_words: bool, state: dict[str, Any] | None
    ) -> None:
        """Opens the files with the `number` in `directory`, new or truncated to `state`.

        Raises:
            UnusableRunError: a file is shorter than recorded in `state`.
        """
        self.route = route
        self.tokens = self.documents = self.text_bytes = 0
        self.paths = {ending: directory / f"{number}.{ending}" for ending in ("bin", "idx", "words", "json", "lengths")}
        if not has_words:
            del self.paths["words"]
        self._checksum = Checksum()
        if state is not None:
            self.tokens, self.documents, self.text_bytes = state["tokens"], state["documents"], state["text_bytes"]
            _truncate(self.paths["bin"], state["bytes"])
            _truncate(self.paths["lengths"], 4 * self.documents)
            if has_words:
                _truncate(self.paths["words"], self.tokens // 8)
            self._hash(self.paths["bin"])
        mode = "ab" if state is not None else "wb"
        self._bin: IO[bytes] = open(self.paths["bin"], mode)  # noqa: SIM115 - closed in `close`
        self._lengths: IO[bytes] = open(self.paths["lengths"], mode)  # noqa: SIM115 - closed in `close`
        self._words = None
        if has_words:
            self._words = BitmapWriter(self.paths["words"], None if state is None else state["bits"])

    def _hash(self, path: Path) -> None:
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
        """Flushes everything to disk.

        Returns:
            State from which the files can be reopened.
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
            "bits": "" if self._words is None else self._words.pending_bits,
        }

    def finish(self, dtype: type) -> dict[str, str]:
        """Writes the index.

        Returns:
            File extension -> checksum of the finished file.
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
        """Closes the files."""
        if self._bin.closed:
            return
        self._bin.close()
        self._lengths.close()
        if self._words is not None:
            self._words.close()


def _truncate(path: Path, size: int) -> None:
    actual = path.stat().st_size if path.exists() else 0
    if actual < size:
        raise UnusableRunError(
            f"{path}: got {actual:,} bytes, expected {size:,} according to the journal; remove the directory to start "
            "from scratch"
        )
    os.truncate(path, size)


class UnfinishedRun:
    """The directory `OUTPUT.unfinished`, locked by one process at a time."""

    def __init__(self, output: str | Path, journal: Journal, resumed: bool) -> None:
        """Created by `open_unfinished`."""
        self.directory = Path(f"{output}{SUFFIX}")
        self.journal = journal
        self.is_saved = resumed
        """Whether a saved state exists that can be resumed from."""
        self.saved_documents = sum(state["documents"] for state in journal.outputs)
        """Number of documents that a resumed run need not process again."""
        self._writers: dict[Route, TokenWriter] = {}
        self._has_words: Callable[[str], bool] = lambda language: False

    def open_writers(self, has_words: Callable[[str], bool]) -> None:
        """Opens the datasets in the journal; `has_words` returns whether a language has a segmenter."""
        self._has_words = has_words
        for state in self.journal.outputs:
            self._open(Route(state["column"], state["language"]), state)

    @property
    def writers(self) -> list[TokenWriter]:
        """Writers of all datasets, in the order of their first text."""
        return list(self._writers.values())

    def writer(self, route: Route) -> TokenWriter:
        """Returns the writer of a route; opens a new one for its first text."""
        return self._writers[route] if route in self._writers else self._open(route, None)

    def _open(self, route: Route, state: dict[str, Any] | None) -> TokenWriter:
        _allow_open_files(_FILES_A_WRITER * (len(self._writers) + 1) + _OTHER_FILES)
        opened = TokenWriter(self.directory, len(self._writers), route, self._has_words(route.language), state)
        self._writers[route] = opened
        return opened

    def save(self) -> None:
        """Saves the current state, from which a later run can resume."""
        if not self.journal.is_complete:
            self.journal.outputs = [writer.sync() for writer in self._writers.values()]
        content = {"format_version": _FORMAT_VERSION, **asdict(self.journal)}
        with write_atomically(self.directory / _JOURNAL) as temporary:
            # File names that are not UTF-8 are written as JSON escapes.
            temporary.write_text(json.dumps(content, ensure_ascii=False), "utf-8", errors="backslashreplace")
        self.is_saved = True
        self.saved_documents = sum(state["documents"] for state in self.journal.outputs)

    def publish(self, moves: Sequence[tuple[Path, Path]], obsolete: Sequence[Path]) -> None:
        """Renames finished and synced files: removes the `obsolete` files, then performs the moves in order. A run that
        was killed here repeats it."""
        for path in obsolete:
            path.unlink(missing_ok=True)
        if obsolete:
            sync_directory(self.directory.parent)
        for source, target in moves:
            # Missing if an earlier run was killed after this move.
            if source.exists():
                os.replace(source, target)
        sync_directory(self.directory.parent)
        shutil.rmtree(self.directory)

    def close(self) -> None:
        """Closes all files."""
        for writer in self._writers.values():
            # Data that cannot be flushed on a full disk is not in the journal anyway.
            try:
                writer.close()
            except OSError:
                continue


def _allow_open_files(count: int) -> None:
    """Raises the limit of open files, which is 256 or 1,024 by default on many systems."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def has_unfinished(output: str | Path) -> bool:
    """Whether an unfinished run exists that can be resumed."""
    return (Path(f"{output}{SUFFIX}") / _JOURNAL).exists()


@contextmanager
def open_unfinished(output: str | Path, settings: dict[str, Any], resume: bool) -> Iterator[UnfinishedRun]:
    """Locks the directory of a run while it runs, and removes it afterwards if nothing was saved in it.

    Args:
        output: output prefix of the run.
        settings: see `Journal.settings`.
        resume: continue an earlier run, if one exists.

    Raises:
        UserError: another process uses the directory; an earlier run exists and `resume` is not set, or it had
            different settings.
    """
    directory = Path(f"{output}{SUFFIX}")
    with ExitStack() as stack:
        created = _lock(directory, stack)
        saved = (directory / _JOURNAL).exists()
        if saved and not resume:
            raise UserError(
                f"{directory}: an unfinished run already exists; continue it with --resume, or remove this directory "
                "to start from scratch"
            )
        journal = _load(directory / _JOURNAL, settings) if saved else Journal(settings)
        unfinished = UnfinishedRun(output, journal, resumed=saved)
        try:
            yield unfinished
        finally:
            unfinished.close()
            if not unfinished.is_saved and directory.exists():
                shutil.rmtree(directory)
                remove_empty(created)


def _lock(directory: Path, stack: ExitStack) -> list[Path]:
    """Creates and locks the directory; returns the directories that were created."""
    while True:
        try:
            created = make_directories(directory)
        except OSError as error:
            raise write_error(directory, error.errno) from error
        try:
            stack.enter_context(file_lock(directory / _LOCK, wait=False))
            return created
        except FileNotFoundError:
            # Another process finished and removed the directory between these two steps.
            continue
        except LockHeldError as error:
            output = str(directory).removesuffix(SUFFIX)
            raise UserError(
                f"{directory}: another process is writing {output} ({error}); wait for it, or choose another --output"
            ) from error
        except OSError as error:
            remove_empty(created)
            raise write_error(directory, error.errno) from error


def _load(path: Path, settings: dict[str, Any]) -> Journal:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version, saved = data.pop("format_version"), data["settings"]
        if version != _FORMAT_VERSION:
            raise ValueError(f"format version {version}, expected {_FORMAT_VERSION}")
        problems = data.pop("problems")
        journal = Journal(
            **data, problems=Problems(problems["count"], [Problem(**problem) for problem in problems["listed"]])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot read journal: {error}; remove its directory to start from scratch") from error
    # JSON has no tuples.
    current = json.loads(json.dumps(settings))
    changed = sorted(key for key in current.keys() | saved.keys() if current.get(key) != saved.get(key))
    if changed:
        changes = "; ".join(f"{key} was {_short(saved.get(key))}, is {_short(current.get(key))}" for key in changed)
        raise UserError(
            f"{path.parent}: the unfinished run has different settings ({changes}); rerun it with the same settings "
            "or remove this directory to start from scratch"
        )
    return journal


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
