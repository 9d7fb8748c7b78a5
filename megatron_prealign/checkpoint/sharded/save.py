"""Saves sharded state in the format of Megatron-Core's `dist_checkpointing` while training continues.

Megatron-Core 0.16.1 writes through forked processes and a manager process, and waits forever when one of them dies;
this module uses only threads. Measured with 116 million parameters in fp32 (1.85 GB), one process on two CPU cores and
ext4 on a virtual disk (`docs/checkpoints.md`): a save pauses training for 0.42 s and is complete after 3.3 s (0.56
GB/s). The first save, which allocates host memory, pauses for 2.5 s; with `async_save: false` each save pauses for 5.6
to 7.2 s.

A save has two parts. `stage` plans it and copies the state into host memory: it is collective, and training is paused.
`BackgroundSave` writes in threads of this process without communication, since collectives of two threads would
interleave: each rank writes a receipt next to its files, and rank 0 completes the directory when all receipts are
there. Errors are kept until the ranks check for them together, and a file system that stops responding ends in a
timeout.
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
# Time until a client of a network file system sees a file written by another client.
_VISIBLE_WITHIN_S = 5.0
# After an error, how much longer than this rank another rank may take to write its part; it may have ended.
_OTHERS_WITHIN_S = 5.0


class HostBuffers:
    """Host memory for copies of a rank's tensors, reused by every save: allocating takes longer than copying.

    Only one save may use it at a time.
    """

    def __init__(self) -> None:
        self._buffers: dict[MetadataIndex, torch.Tensor] = {}

    def copy(self, index: MetadataIndex, tensor: torch.Tensor) -> torch.Tensor:
        """Copies a tensor to host memory; a copy from a GPU is complete after the device is synchronised."""
        buffer = self._buffers.get(index)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            # Without pinned memory, a copy from a GPU takes several times as long.
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[index] = buffer
        return buffer.copy_(tensor, non_blocking=True)


@dataclass(frozen=True, eq=False)
class _File:
    """One file of this rank and its content."""

    name: str
    items: Sequence[tuple[WriteItem, io.BytesIO | torch.Tensor]]


class _Writer(FileSystemWriterAsync):
    """Keeps the plan in memory: a disk error between two collectives would leave the other ranks waiting."""

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
        # A view would be written with its complete storage.
        is_view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
        return self._buffers.copy(index, tensor) if self._copy or tensor.is_cuda or is_view else tensor


@dataclass(frozen=True, eq=False)
class StagedState:
    """A checkpoint that is planned and in host memory, to be written without communication."""

    target: Target
    token: str
    rank: int
    world_size: int
    files: Sequence[_File]
    common: bytes
    """Content of `COMMON_FILE`: the pickled plain values; empty except on rank 0."""
    writer: _Writer
    metadata: Any
    """On rank 0, the initial content of `.metadata`; None on other ranks."""

    @property
    def bytes(self) -> int:
        """Size of this rank's tensors in bytes."""
        tensors = (data for file in self.files for _, data in file.items if isinstance(data, torch.Tensor))
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def stage(
    state: dict[str, Any], target: Target, *, buffers: HostBuffers, timeout_s: float, copy: bool = True
) -> StagedState:
    """Plans the save of `state` (sharded tensors and plain values) and copies it to host memory.

    Collective: call on all ranks.

    Args:
        target: Paths of the checkpoint; its working directory exists and is empty.
        buffers: Host buffers of this rank, not in use by another save.
        timeout_s: Timeout of the file system, in seconds.
        copy: Also copy tensors that are in host memory; otherwise they must not change until the save is complete.
            Tensors on a GPU are always copied.

    Raises:
        UserError: the directory cannot be written or is not shared by all ranks; raised on all ranks.
    """
    sharded, common = save_preprocess(state)
    what = f"saving {target.final}"
    token = from_rank_zero(what, lambda: target.run_with_timeout(lambda: _write_token(target.working), timeout_s))
    on_every_rank(what, lambda: target.run_with_timeout(lambda: _open_receipt(target, token), timeout_s))
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
            # The plans of all ranks; no reader of the file needs them.
            del metadata.all_local_plans
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception as caught:
        error = caught
    all_ranks_ok(error, what)
    return StagedState(target, token, dist.get_rank(), dist.get_world_size(), writer.files, plain, writer, metadata)


def _pickled(common: dict[str, Any]) -> bytes:
    """Pickles the plain values at once: training changes the optimizer's settings, which are among them."""
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
    """Waits until this rank sees the token that rank 0 wrote, and creates its empty receipt.

    The receipt exists from the start because a client of a network file system may cache for long that a name is
    missing.
    """
    deadline_s = time.monotonic() + _VISIBLE_WITHIN_S
    while _read_token(target.working) != token:
        if time.monotonic() > deadline_s:
            raise UserError(
                f"cannot write checkpoint {target.final}: rank {dist.get_rank()} does not see files that rank 0 wrote "
                f"to {target.working}; checkpoint.directory must be on a file system that all nodes share"
            )
        time.sleep(0.05)
    _receipt(target.working, dist.get_rank()).touch()


def _read_token(directory: Path) -> str:
    try:
        return (directory / _TOKEN).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _write_file(directory: Path, file: _File) -> tuple[list[WriteResult], FileRecord]:
    """Writes and syncs one file; returns the location of each item in it, and its record."""
    results = []
    with HashedFile(directory / file.name) as stream:
        for item, data in file.items:
            start = stream.tell()
            if isinstance(data, torch.Tensor):
                torch.save(data, cast(BinaryIO, stream))
            else:
                stream.write(data.getbuffer())
            length = stream.tell() - start
            location = _StorageInfo(file.name, start, length)
            results.append(WriteResult(index=item.index, size_in_bytes=length, storage_data=location))
        return results, stream.sync()


class _CancelledError(Exception):
    """Another rank failed to write: this rank stops too."""


class BackgroundSave:
    """A save in progress, in daemon threads of this process."""

    def __init__(
        self, staged: StagedState, *, timeout_s: float, complete: Callable[[Mapping[str, FileRecord]], None]
    ) -> None:
        """Starts writing.

        Args:
            timeout_s: Timeout of writing and completing, in seconds from now.
            complete: Called on rank 0, in another thread, when the directory has all files of the sharded state, with
                their records by name; it makes the directory a checkpoint.
        """
        self._staged = staged
        self._complete = complete
        self._timeout_s = timeout_s
        self._started_s = time.monotonic()
        self._deadline_s = self._started_s + timeout_s
        self._others_deadline_s = self._deadline_s
        self._error: Exception | None = None
        self._written, self._done, self._cancelled = threading.Event(), threading.Event(), threading.Event()
        # Daemon threads: a write that never returns must not keep the process alive after the timeout.
        threading.Thread(target=self._run, name="checkpoint-save", daemon=True).start()

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save cannot succeed."""
        timed_out = not self._done.is_set() and time.monotonic() > self._deadline_s
        return self._error is not None or timed_out

    @property
    def is_done(self) -> bool:
        """Whether this rank has finished its part, with or without an error."""
        return self._done.is_set()

    def finish(self) -> None:
        """Waits until the checkpoint is complete. Collective: call on all ranks.

        Raises:
            UserError: some rank met a disk error or a timeout; raised on all ranks.
        """
        what = f"saving {self._staged.target.final}"
        try:
            # Two steps: a rank that cannot write may not be able to write its receipt either, which rank 0 would wait
            # for.
            on_every_rank(what, lambda: self._wait(self._written))
            on_rank_zero(what, self.wait)
        except BaseException:
            self._cancelled.set()
            raise

    def wait(self) -> None:
        """Waits until this rank's part is written, on rank 0 until the checkpoint is complete.

        Raises:
            UserError: a disk error or a timeout.
        """
        self._wait(self._done)

    def wait_after_error(self) -> None:
        """Like `wait`, but waits for receipts of other ranks only about as long as this rank's part took: a rank that
        has ended leaves none.

        Raises:
            UserError: a disk error, a timeout, or a missing receipt.
        """
        self._wait(self._written)
        now_s = time.monotonic()
        self._others_deadline_s = min(self._deadline_s, now_s + max(_OTHERS_WITHIN_S, now_s - self._started_s))
        self.wait()

    def _wait(self, event: threading.Event) -> None:
        if not event.wait(max(0.0, self._deadline_s - time.monotonic())):
            self._raise_timeout("the file system did not finish writing")
        if self._error is not None:
            raise self._error

    def _raise_timeout(self, what: str) -> NoReturn:
        raise UserError(self._staged.target.timeout_message(what, self._timeout_s))

    def _run(self) -> None:
        staged = self._staged
        try:
            with staged.target.disk_errors_as_user_errors():
                self._write()
                self._written.set()
                if staged.rank == 0:
                    results, records = self._collect_receipts()
                    records |= self._write_metadata(results)
                    self._complete(records)
        except Exception as error:
            self._error = error
            self._write_receipt({"error": str(error) if isinstance(error, UserError) else repr(error)}, quietly=True)
        finally:
            self._written.set()
            self._done.set()

    def _write(self) -> None:
        outcomes: queue.SimpleQueue[tuple[_File, Any]] = queue.SimpleQueue()

        def write(file: _File) -> None:
            try:
                outcomes.put((file, _write_file(self._staged.target.working, file)))
            except Exception as error:
                outcomes.put((file, error))

        for file in self._staged.files:
            threading.Thread(target=write, args=(file,), name=f"checkpoint-{file.name}", daemon=True).start()
        results: list[Any] = []
        records: dict[str, FileRecord] = {}
        for _ in self._staged.files:
            try:
                file, outcome = outcomes.get(timeout=max(0.0, self._deadline_s - time.monotonic()))
            except queue.Empty:
                self._raise_timeout("the file system did not finish writing")
            if isinstance(outcome, Exception):
                raise outcome
            written, records[file.name] = outcome
            results += [
                (result.index.fqn, result.index.offset, result.index.index, file.name, *_location(result))
                for result in written
            ]
        self._write_receipt({"results": results, "files": {name: asdict(record) for name, record in records.items()}})

    def _write_receipt(self, content: dict[str, Any], *, quietly: bool = False) -> None:
        """Writes the receipt in place: rank 0 might not see a new name while its directory listing is cached."""
        path = _receipt(self._staged.target.working, self._staged.rank)
        try:
            with path.open("w", encoding="utf-8") as file:
                json.dump({"token": self._staged.token, **content}, file)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            if not quietly:
                raise

    def _collect_receipts(self) -> tuple[list[list[WriteResult]], dict[str, FileRecord]]:
        """Waits for the receipts of all ranks. Each is opened, since a directory listing may be outdated."""
        results: dict[int, list[WriteResult]] = {}
        records: dict[str, FileRecord] = {}
        pause_s = 0.005
        while missing := [rank for rank in range(self._staged.world_size) if rank not in results]:
            for rank in missing:
                receipt = self._read_receipt(rank)
                if receipt is None:
                    continue
                results[rank] = [_result(*values) for values in receipt["results"]]
                records |= {name: FileRecord(**record) for name, record in receipt["files"].items()}
                pause_s = 0.005
            if len(results) < self._staged.world_size:
                if self._cancelled.wait(pause_s):
                    raise _CancelledError
                now_s, reason = time.monotonic(), f"rank {missing[0]} did not report that its part is written"
                if now_s > self._deadline_s:
                    self._raise_timeout(reason)
                if now_s > self._others_deadline_s:
                    raise UserError(self._staged.target.failure_message(reason))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return [results[rank] for rank in sorted(results)], records

    def _read_receipt(self, rank: int) -> dict[str, Any] | None:
        try:
            receipt = json.loads(_receipt(self._staged.target.working, rank).read_bytes())
        except ValueError:
            # Empty until the rank is done, truncated while it writes.
            return None
        if receipt.get("token") != self._staged.token:
            return None
        if "error" in receipt:
            raise UserError(receipt["error"])
        return receipt

    def _write_metadata(self, results: list[list[WriteResult]]) -> dict[str, FileRecord]:
        staged = self._staged
        records = {COMMON_FILE: self._write_bytes(COMMON_FILE, staged.common)}
        staged.writer.finish(staged.metadata, results)
        records[BACKEND_FILE] = self._write_bytes(BACKEND_FILE, json.dumps(BACKEND).encode())
        for path in (
            staged.target.working / _TOKEN,
            *(_receipt(staged.target.working, rank) for rank in range(staged.world_size)),
        ):
            path.unlink()
        return records

    def _write_bytes(self, name: str, content: bytes) -> FileRecord:
        with HashedFile(self._staged.target.working / name) as file:
            file.write(content)
            return file.sync()


def _location(result: WriteResult) -> tuple[int, int]:
    return result.storage_data.offset, result.storage_data.length


def _result(
    name: str, offset: Sequence[int] | None, index: int | None, file: str, start: int, length: int
) -> WriteResult:
    """A result of `_write_file`, restored from a receipt."""
    return WriteResult(
        index=MetadataIndex(name, offset, index), size_in_bytes=length, storage_data=_StorageInfo(file, start, length)
    )
