"""Tokenises blocks in worker processes and gives the results in the order of the blocks."""

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

# Blocks in flight per worker: one at work, one waiting, so that no worker starves while the parent writes.
_BLOCKS_PER_WORKER = 2
# Text in flight: many large blocks at once must not fill the memory, however many workers there are.
_BYTES_IN_FLIGHT = 256 << 20


@dataclass
class EngineChoice:
    """Whether blocks still go through the fast engine. Whoever takes the results may change it at any time: it holds
    from the next block on, also for those already on their way."""

    plain: bool = False


@dataclass
class _Waiting:
    block: Block
    plain: bool
    future: Future[TokenisedBlock]


def tokenise_in_order(
    blocks: Iterator[Block], tokenise: BlockTokeniser, workers: int, choice: EngineChoice
) -> Generator[tuple[Block, TokenisedBlock], None, None]:
    """Tokenises blocks, with `tokenise` in this process (`workers` 1) or with its like in others.

    Raises:
        UserError: a worker process died.
    """
    if workers == 1:
        for block in blocks:
            yield block, tokenise(block, choice.plain)
        return
    # Forking a process in which tokenizers may hold threads can deadlock the child.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(tokenise.settings, context.Lock())
    )
    waiting: deque[_Waiting] = deque()

    def next_result() -> tuple[Block, TokenisedBlock]:
        done = waiting.popleft()
        if done.plain != choice.plain:
            # Sent off before the choice was made.
            done.future = _submit(pool, done.block, choice.plain)
        return done.block, done.future.result()

    try:
        for block in blocks:
            waiting.append(_Waiting(block, choice.plain, _submit(pool, block, choice.plain)))
            while len(waiting) >= workers * _BLOCKS_PER_WORKER or (
                len(waiting) > 1 and sum(each.block.size for each in waiting) > _BYTES_IN_FLIGHT
            ):
                yield next_result()
        while waiting:
            yield next_result()
    except BrokenProcessPool as error:
        raise UserError(
            f"a worker process died (killed, or out of memory?); give fewer --workers than {workers}, or a smaller "
            "--max-document-mb"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, block: Block, plain: bool) -> Future[TokenisedBlock]:
    # This may start a process, which takes over what is blocked: Ctrl-C cannot hit it before `_start_worker` runs.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_tokenise_in_worker, block, plain)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# What a worker process keeps between blocks; set once when it starts, never in the parent.
_worker: BlockTokeniser | None = None


def _start_worker(settings: TokeniserSettings, large_texts: AbstractContextManager[object]) -> None:
    global _worker
    # Ctrl-C reaches every process of the terminal; the parent alone decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes share the cores already; the library's threads in each would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = BlockTokeniser(settings, large_texts=large_texts)


def _end_with_parent() -> None:
    """A parent that is killed cannot send its workers home; they would wait for blocks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _tokenise_in_worker(block: Block, plain: bool) -> TokenisedBlock:
    assert _worker is not None, "the pool starts every process with _start_worker"
    return _worker(block, plain)
