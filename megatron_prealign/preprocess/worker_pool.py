"""Tokenises blocks in worker processes and yields the results in block order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass

from megatron_prealign.corpus.blocks import Block
from megatron_prealign.errors import UserError
from megatron_prealign.preprocess.tokenise import BlockTokeniser, TokenisedBlock, TokeniserSettings

# Blocks in flight per worker: one running, one queued, so that no worker starves while the parent writes.
_BLOCKS_PER_WORKER = 2
# Bytes of text in flight: bounds memory with large blocks, independent of the number of workers.
_BYTES_IN_FLIGHT = 256 << 20


@dataclass
class EngineChoice:
    """Whether blocks use the plain tokenizer instead of the fast engine. The consumer of the results may change it at
    any time; it applies from the next block on, including blocks already in flight."""

    plain: bool = False


@dataclass
class _Pending:
    block: Block
    plain: bool
    future: Future[TokenisedBlock]


def tokenise_in_order(
    blocks: Iterator[Block], tokenise: BlockTokeniser, workers: int, choice: EngineChoice
) -> Generator[tuple[Block, TokenisedBlock], None, None]:
    """Tokenises blocks with `tokenise` in this process (`workers` 1), or with equal tokenisers in worker processes.

    Raises:
        UserError: a worker process died.
    """
    if workers == 1:
        for block in blocks:
            yield block, tokenise(block, choice.plain)
        return
    # Forking a process in which tokenizers may have started threads can deadlock the child.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(tokenise.settings, context.Lock())
    )
    pending: deque[_Pending] = deque()

    def next_result() -> tuple[Block, TokenisedBlock]:
        done = pending.popleft()
        if done.plain != choice.plain:
            # Submitted before the choice changed.
            done.future = _submit(pool, done.block, choice.plain)
        return done.block, done.future.result()

    try:
        for block in blocks:
            pending.append(_Pending(block, choice.plain, _submit(pool, block, choice.plain)))
            while len(pending) >= workers * _BLOCKS_PER_WORKER or (
                len(pending) > 1 and sum(each.block.size for each in pending) > _BYTES_IN_FLIGHT
            ):
                yield next_result()
        while pending:
            yield next_result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died (killed or out of memory?); use fewer --workers than {workers} or reduce "
            "--max-document-mb"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, block: Block, plain: bool) -> Future[TokenisedBlock]:
    # This may start a process, which inherits the signal mask: Ctrl-C cannot reach it before `_start_worker` runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_tokenise_in_worker, block, plain)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# State of a worker process; set once when it starts, never in the parent.
_worker: BlockTokeniser | None = None


def _start_worker(settings: TokeniserSettings, large_texts: AbstractContextManager[object]) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The worker processes already use all cores; additional threads of the library would compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker = BlockTokeniser(settings, large_texts=large_texts)


def _exit_with_parent() -> None:
    """Exits when the parent dies: a killed parent cannot shut down its workers, which would wait for blocks forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenise_in_worker(block: Block, plain: bool) -> TokenisedBlock:
    assert _worker is not None, "the pool starts every process with _start_worker"
    return _worker(block, plain)
