"""Writes sharded state in the format of Megatron-Core's `dist_checkpointing`, while training goes on.

Megatron-Core 0.16.1 writes through forked processes and a manager process, and waits without end when one of them dies.
Here a save has two halves. `stage` plans it and copies what it needs into host memory: all ranks take part, and
training stands still. `BackgroundSave` writes in threads of this process and talks to no other rank, for collectives of
two threads would mix: each rank leaves a receipt beside its files, and the first rank completes the directory when it
has them all. An error is kept until the ranks ask for it together, and a disk that stops answering ends in a timeout.
"""

import io
import json
import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    FileSystemWriterAsync,
    _split_by_size_and_type,
)
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from megatron_prealign.checkpoint.manifest import FileRecord, HashedFile
from megatron_prealign.checkpoint.sharded.target import Target
from megatron_prealign.checkpoint.torch_dist import BACKEND, BACKEND_FILE, COMMON_FILE
from megatron_prealign.errors import UserError
from megatron_prealign.runtime.agreement import all_ranks_ok, control_group, from_rank_zero, on_every_rank, on_rank_zero

_WRITER_THREADS = 2
_TOKEN = ".save"
_LONGEST_PAUSE_S = 1.0
# What a client of a network disk may take to see a file of another one.
_VISIBLE_WITHIN_S = 5.0
# How much later than this one another rank may be done with its part, when it is not sure that it is still there.
_OTHERS_WITHIN_S = 5.0


class HostBuffers:
    """Host memory that the tensors of a rank are copied into; kept from save to save, for new memory costs more time
    than the copy. One save may use it at a time."""

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}

    def copy(self, index: MetadataIndex, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in host memory; a copy from a GPU is complete after the device has been synchronised."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Pinned, or a copy from a GPU would take several times as long.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[index] = buffer
        return buffer.copy_(tensor, non_blocking=True)


@dataclass(frozen=True, eq=False)
class _File:
    """One file of this rank and what goes into it."""

    name: str
    items: Sequence[tuple[WriteItem, io.BytesIO | torch.Tensor]]


class _Writer(FileSystemWriterAsync):
    """Takes a plan and leaves it in memory: a disk that fails between two collectives would keep the others waiting."""

    files: list[_File]

    def __init__(self, directory: Path, buffers: HostBuffers, *, copy: bool) -> None:
        super().__init__(directory, thread_count=_WRITER_THREADS)
        self._buffers = buffers
        self._copy = copy

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        filled = [items for items in _split_by_size_and_type(_WRITER_THREADS, plan.items) if items]
        self.files = [
            _File(
                f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}",
                [(item, self._in_host_memory(item.index, planner.resolve_data(item))) for item in items],
            )
            for number, items in enumerate(filled)
        ]

    def _in_host_memory(self, index: MetadataIndex, data: Any) -> io.BytesIO | torch.Tensor:
        if isinstance(data, io.BytesIO):
            return data
        tensor: torch.Tensor = data.detach()
        # A view would be written with all of the memory it looks into.
        is_view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
        return self._buffers.copy(index, tensor) if self._copy or tensor.is_cuda or is_view else tensor


@dataclass(frozen=True, eq=False)
class StagedState:
    """A checkpoint that is planned and in host memory, to be written without any other rank's help."""

    target: Target
    token: str
    rank: int
    world_size: int
    files: Sequence[_File]
    common: bytes
    """Plain values, as `COMMON_FILE` contains them."""
    writer: _Writer
    metadata: Any
    """On the first rank what `.metadata` begins with."""

    @property
    def bytes(self) -> int:
        """Size of this rank's tensors."""
        tensors = (data for file in self.files for _, data in file.items if isinstance(data, torch.Tensor))
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def stage(
    state: dict[str, Any], target: Target, *, buffers: HostBuffers, timeout_s: float, copy: bool = True
) -> StagedState:
    """Plans how `state` (sharded tensors and plain values) goes into the target's existing, empty directory. Takes
    part: all ranks.

    Args:
        buffers: of this rank, not in use by another save.
        timeout_s: the longest to wait for the disk.
        copy: copy what is in host memory already too; without it the tensors must stay as they are until the save is
            complete. What is on a GPU is always copied.

    Raises:
        UserError: the directory cannot be written or is not shared by all ranks; raised on all ranks.
    """
    sharded, common = save_preprocess(state)
    what = f"saving {target.final}"
    token = from_rank_zero(what, lambda: target.answer(lambda: _write_token(target.working), timeout_s))
    on_every_rank(what, lambda: target.answer(lambda: _open_receipt(target, token), timeout_s))
    writer = _Writer(target.working, buffers, copy=copy)
    metadata, plain, error = None, b"", None
    try:
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planned, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(renamed, False), writer, control_group(), 0, planner=planner
        )
        metadata = planned[1]
        if dist.get_rank() == 0:
            plain = _pickled(common)
            # Every rank's plan, which nothing reads from the file.
            del metadata.all_local_plans
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as caught:
        error = caught
    all_ranks_ok(error, what)
    return StagedState(target, token, dist.get_rank(), dist.get_world_size(), writer.files, plain, writer, metadata)


def _pickled(common: dict[str, Any]) -> bytes:
    """Now: training goes on changing the optimizer's settings, which are among these values."""
    stream = io.BytesIO()
    torch.save(common, stream)
    return stream.getvalue()


def _write_token(directory: Path) -> str:
    token = uuid.uuid4().hex
    (directory / _TOKEN).write_text(token, encoding="utf-8")
    return token


def _receipt(directory: Path, rank: int) -> Path:
    return directory / f".receipt_{rank:05d}"


def _open_receipt(target: Target, token: str) -> None:
    """Makes sure that this rank sees what the first one wrote, and that its receipt has a name from now on: a client of
    a network disk may remember for long that a name was not there."""
    deadline_s = time.monotonic() + _VISIBLE_WITHIN_S
    while _read_token(target.working) != token:
        if time.monotonic() > deadline_s:
            raise UserError(
                f"checkpoint {target.final} cannot be written: process {dist.get_rank()} does not see what process 0 "
                f"wrote into {target.working}; checkpoint.directory must lie on a disk that all nodes share"
            )
        time.sleep(0.05)
    _receipt(target.working, dist.get_rank()).touch()


def _read_token(directory: Path) -> str:
    try:
        return (directory / _TOKEN).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _write_file(directory: Path, file: _File) -> tuple[list[WriteResult], FileRecord]:
    """Writes and syncs one file; says where in it each item lies."""
    results = []
    with HashedFile(directory / file.name) as stream:
        for item, data in file.items:
            start = stream.tell()
            if isinstance(data, torch.Tensor):
                torch.save(data, cast(BinaryIO, stream))
            else:
                stream.write(data.getbuffer())
            length = stream.tell() - start
            place = _StorageInfo(file.name, start, length)
            results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=place))
        return results, stream.sync()


class _CancelledError(Exception):
    """Another rank could not write: this one need not go on."""


class BackgroundSave:
    """A save under way, in threads of this process that end with it."""

    def __init__(
        self, staged: StagedState, *, timeout_s: float, complete: Callable[[Mapping[str, FileRecord]], None]
    ) -> None:
        """Starts to write.

        Args:
            timeout_s: the longest that writing and completing may take from now on.
            complete: called on the first rank, in another thread, when the sharded state is in the directory with all
                its files; it is given their facts by name, and makes the directory a checkpoint.
        """
        self._staged = staged
        self._complete = complete
        self._timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._deadline_s = self._started_s + timeout_s
        self._others_deadline_s = self._deadline_s
        self._error: Exception | None = None
        self._written, self._over, self._cancelled = threading.Event(), threading.Event(), threading.Event()
        # Daemons: a write that never returns must not keep the process alive after the timeout.
        threading.Thread(target=self._run, name="checkpoint-save", daemon=True).start()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save cannot succeed."""
        late = not self._over.is_set() and time.monotonic() > self._deadline_s
        return self._error is not None or late

    @property
    def is_over(self) -> bool:
        """Whether this rank has done its part, well or not."""
        return self._over.is_set()

    def finish(self) -> None:
        """Waits until the checkpoint is complete. Takes part: all ranks.

        Raises:
            UserError: the disk failed some rank, or did not answer in time; raised on all ranks.
        """
        what = f"saving {self._staged.target.final}"
        try:
            # Two agreements: a rank that cannot write may not be able to say so in its receipt either, and the first
            # rank would wait for that.
            on_every_rank(what, lambda: self._wait(self._written))
            on_rank_zero(what, self.wait)
        except BaseException:
            self._cancelled.set()
            raise

    def wait(self) -> None:
        """Waits until this rank's part is done, on the first rank until the checkpoint is complete.

        Raises:
            UserError: the disk failed or did not answer in time.
        """
        self._wait(self._over)

    def wait_after_error(self) -> None:
        """`wait` when another rank may have ended, which leaves no receipt: theirs are waited for about as long as this
        rank's part took.

        Raises:
            UserError: the disk failed or did not answer in time, or there was no receipt.
        """
        self._wait(self._written)
        now_s = time.monotonic()
        self._others_deadline_s = min(self._deadline_s, now_s + max(_OTHERS_WITHIN_S, now_s - self._started_s))
        self.wait()

    def _wait(self, event: threading.Event) -> None:
        if not event.wait(max(0.0, self._deadline_s - time.monotonic())):
            self._raise_late("the file system did not take the checkpoint")
        if self._error is not None:
            raise self._error

    def _raise_late(self, what: str) -> NoReturn:
        raise UserError(self._staged.target.late(what, self._timeout_s))

    def _run(self) -> None:
        staged = self._staged
        try:
            with staged.target.disk_errors_as_user_errors():
                self._write()
                self._written.set()
                if staged.rank == 0:
                    results, facts = self._collect()
                    facts |= self._write_metadata(results)
                    self._complete(facts)
        except Exception as error:
            self._error = error
            self._leave_receipt({"error": str(error) if isinstance(error, UserError) else repr(error)}, quietly=True)
        finally:
            self._written.set()
            self._over.set()

    def _write(self) -> None:
        answers: queue.SimpleQueue[tuple[_File, Any]] = queue.SimpleQueue()

        def write(file: _File) -> None:
            try:
                answers.put((file, _write_file(self._staged.target.working, file)))
            except Exception as error:
                answers.put((file, error))

        for file in self._staged.files:
            threading.Thread(target=write, args=(file,), name=f"checkpoint-{file.name}", daemon=True).start()
        results: list[Any] = []
        facts: dict[str, FileRecord] = {}
        for _ in self._staged.files:
            try:
                file, answer = answers.get(timeout=max(0.0, self._deadline_s - time.monotonic()))
            except queue.Empty:
                self._raise_late("the file system did not take the checkpoint")
            if isinstance(answer, Exception):
                raise answer
            written, facts[file.name] = answer
            results += [
                (result.index.fqn, result.index.offset, result.index.index, file.name, *_place(result))
                for result in written
            ]
        self._leave_receipt({"results": results, "files": {name: asdict(record) for name, record in facts.items()}})

    def _leave_receipt(self, content: dict[str, Any], *, quietly: bool = False) -> None:
        """Writes in place: a new name could hide from the first rank for as long as its directory is cached."""
        path = _receipt(self._staged.target.working, self._staged.rank)
        try:
            with path.open("w", encoding="utf-8") as file:
                json.dump({"token": self._staged.token, **content}, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if not quietly:
                raise

    def _collect(self) -> tuple[list[list[WriteResult]], dict[str, FileRecord]]:
        """Waits for every rank's receipt. Each is opened to look: a listing may be older than the file."""
        results: dict[int, list[WriteResult]] = {}
        facts: dict[str, FileRecord] = {}
        pause_s = 0.005
        while missing := [rank for rank in range(self._staged.world_size) if rank not in results]:
            for rank in missing:
                receipt = self._read_receipt(rank)
                if receipt is None:
                    continue
                results[rank] = [_result(*place) for place in receipt["results"]]
                facts |= {name: FileRecord(**record) for name, record in receipt["files"].items()}
                pause_s = 0.005
            if len(results) < self._staged.world_size:
                if self._cancelled.wait(pause_s):
                    raise _CancelledError
                now_s, silent = time.monotonic(), f"process {missing[0]} did not say that its part is written"
                if now_s > self._deadline_s:
                    self._raise_late(silent)
                if now_s > self._others_deadline_s:
                    raise UserError(self._staged.target.failure(silent))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return [results[rank] for rank in sorted(results)], facts

    def _read_receipt(self, rank: int) -> dict[str, Any] | None:
        try:
            receipt = json.loads(_receipt(self._staged.target.working, rank).read_bytes())
        except ValueError:
            # Empty until the rank is done, and cut off while it writes.
            return None
        if receipt.get("token") != self._staged.token:
            return None
        if "error" in receipt:
            raise UserError(receipt["error"])
        return receipt

    def _write_metadata(self, results: list[list[WriteResult]]) -> dict[str, FileRecord]:
        staged = self._staged
        facts = {COMMON_FILE: self._write_bytes(COMMON_FILE, staged.common)}
        staged.writer.finish(staged.metadata, results)
        facts[BACKEND_FILE] = self._write_bytes(BACKEND_FILE, json.dumps(BACKEND).encode())
        for path in (
            staged.target.working / _TOKEN,
            *(_receipt(staged.target.working, rank) for rank in range(staged.world_size)),
        ):
            path.unlink()
        return facts

    def _write_bytes(self, name: str, content: bytes) -> FileRecord:
        with HashedFile(self._staged.target.working / name) as file:
            file.write(content)
            return file.sync()


def _place(result: WriteResult) -> tuple[int, int]:
    return result.storage_data.offset, result.storage_data.length


def _result(
    name: str, offset: Sequence[int] | None, index: int | None, file: str, start: int, length: int
) -> WriteResult:
    """What `_write_file` said, back from a receipt."""
    return WriteResult(
        index=MetadataIndex(name, offset, index), size_in_bytes=length, storage_data=_StorageInfo(file, start, length)
    )
