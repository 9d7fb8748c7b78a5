"""How long calls take, on a GPU and on a CPU.

On a GPU a call is captured in a CUDA graph, so that the time of the host is left out, and its replays are timed by
events. Enough work is queued ahead of them that the GPU never waits for the host.
"""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the first that is measured."""
LEAST_REPEATS = 3
"""Repeats even of a call so slow that they take longer than `LIMIT_S`."""
LIMIT_S = 20.0
"""No further repeat of a measurement by the host's clock is begun after this many seconds."""
WARM_CALLS = 20
"""Calls in a graph that is measured with a warm L2: so many that what a graph's start takes is spread thin."""
_FLUSH_BYTES = 256 << 20
_MICRO = 1e6


class Timing(NamedTuple):
    """Microseconds a call, over all repeats."""

    median_us: float
    p10_us: float
    p90_us: float
    repeats: int
    fastest_us: float = float("nan")


def summarise(seconds: Sequence[float]) -> Timing:
    """Median, 10th and 90th percentile and the least of the seconds that the repeats took."""
    low, middle, high = np.percentile(np.asarray(seconds) * _MICRO, [10, 50, 90])
    return Timing(float(middle), float(low), float(high), len(seconds), min(seconds) * _MICRO)


def one_thread() -> AbstractContextManager[None]:
    """torch works in one thread inside the block."""
    return threads(1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch works in `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_call(call: Callable[[], Any], repeats: int, device: torch.device) -> Timing:
    """By the host's clock from the begin of a call until the device is done, waits for it included.

    Args:
        call: what is measured; on a CPU inside `one_thread`.
        repeats: how often, if that takes no longer than LIMIT_S.
        device: where the call runs.
    """
    return _by_clock(call, repeats, device, waits=True)


def time_host(call: Callable[[], Any], repeats: int, device: torch.device) -> Timing:
    """By the host's clock until the call comes back, on a GPU with nothing to do: what handing the work over takes."""
    return _by_clock(call, repeats, device, waits=False)


def _by_clock(call: Callable[[], Any], repeats: int, device: torch.device, *, waits: bool) -> Timing:
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else _nothing
    begun = time.perf_counter()
    for _ in range(WARM_UP):
        call()
    seconds: list[float] = []
    with _no_garbage_collection():
        while len(seconds) < repeats:
            if len(seconds) >= LEAST_REPEATS and time.perf_counter() - begun > LIMIT_S:
                break
            wait()
            start = time.perf_counter()
            call()
            if waits:
                wait()
            seconds.append(time.perf_counter() - start)
    return summarise(seconds)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As `timeit` does: a collection hits any call, and its length is that of everything else in memory."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _nothing() -> None:
    return None


class CapturedCall(NamedTuple):
    """A CUDA graph of one or several identical calls."""

    graph: torch.cuda.CUDAGraph
    calls: int
    output: Any
    """What the last call returned; every replay writes it anew."""


def capture(call: Callable[[], Any], calls: int) -> CapturedCall:
    """Captures `calls` calls one after the other, after `WARM_UP` calls that compile what is to be compiled."""
    # work before a capture belongs on a side stream: notes on CUDA graphs in torch's documentation
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    output = None
    with torch.cuda.graph(graph):
        for _ in range(calls):
            # frees the memory of the call before for the next one, as from step to step in training
            output = None
            output = call()
    return CapturedCall(graph, calls, output)


def flush_buffer(device: torch.device) -> Tensor:
    """A buffer several times the size of the L2: writing it leaves nothing else there."""
    size = max(_FLUSH_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.uint8, device=device)


def time_replays(captured: CapturedCall, repeats: int, flush: Tensor | None) -> Timing:
    """Times replays by CUDA events.

    Args:
        captured: what is replayed.
        repeats: replays that are measured.
        flush: a `flush_buffer` that is written before every replay, which makes the L2 cold; None leaves it warm.
    """
    events = []
    for _ in range(WARM_UP + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush is not None:
            flush.zero_()
        start.record()
        captured.graph.replay()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return summarise([start.elapsed_time(end) * 1e-3 / captured.calls for start, end in events[WARM_UP:]])


def copy_bandwidth(device: torch.device, size: int, repeats: int = 10) -> float:
    """Bytes a second of `Tensor.copy_`, read and written bytes counted both.

    Args:
        device: a GPU, or the CPU inside `one_thread`.
        size: bytes of the buffer; far more than the caches hold.
        repeats: copies that are measured.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    if device.type == "cuda":
        timing = time_replays(capture(copy, 1), repeats, None)
    else:
        timing = time_call(copy, repeats, device)
    return 2 * size / timing.median_us * _MICRO
