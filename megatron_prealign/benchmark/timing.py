"""Timing of calls on a GPU and on a CPU.

On a GPU a call is captured in a CUDA graph, which excludes host time, and its replays are timed with CUDA events. All
replays are queued without synchronising, so the GPU never waits for the host.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_prealign.resources import gc_disabled

WARM_UP = 3
"""Calls before the first measured call."""
MIN_REPEATS = 3
"""Minimum number of repeats, even if they take longer than `LIMIT_S`."""
LIMIT_S = 20.0
"""Seconds after which a measurement with the host clock starts no further repeat."""
WARM_CALLS = 20
"""Calls per graph for measurements with a warm L2 cache, to amortise the launch of the graph."""
_FLUSH_BYTES = 256 << 20
_MICRO = 1e6
_COPIES = 10


class Timing(NamedTuple):
    """Microseconds per call, over all repeats."""

    median_us: float
    p10_us: float
    p90_us: float
    repeats: int
    fastest_us: float = float("nan")


def summarise(seconds: Sequence[float]) -> Timing:
    """Computes median, 10th and 90th percentile and minimum of the durations of the repeats."""
    low, middle, high = np.percentile(np.asarray(seconds) * _MICRO, [10, 50, 90])
    return Timing(float(middle), float(low), float(high), len(seconds), min(seconds) * _MICRO)


def one_thread() -> AbstractContextManager[None]:
    """Context in which torch uses one thread."""
    return threads(1)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Context in which torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def time_call(call: Callable[[], Any], repeats: int, device: torch.device) -> Timing:
    """Times calls with the host clock, including synchronisation with the device.

    Args:
        call: The call to measure; on a CPU inside `one_thread`.
        repeats: Number of repeats, unless they take longer than `LIMIT_S`.
        device: Device of the call.
    """
    return _time_with_host_clock(call, repeats, device, synchronise=True)


def time_host(call: Callable[[], Any], repeats: int, device: torch.device) -> Timing:
    """Times calls with the host clock until they return, with an idle GPU: the launch overhead."""
    return _time_with_host_clock(call, repeats, device, synchronise=False)


def _time_with_host_clock(call: Callable[[], Any], repeats: int, device: torch.device, *, synchronise: bool) -> Timing:
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else _nothing
    measurement_start = time.perf_counter()
    for _ in range(WARM_UP):
        call()
    seconds: list[float] = []
    with gc_disabled():
        while len(seconds) < repeats:
            if len(seconds) >= MIN_REPEATS and time.perf_counter() - measurement_start > LIMIT_S:
                break
            wait()
            start = time.perf_counter()
            call()
            if synchronise:
                wait()
            seconds.append(time.perf_counter() - start)
    return summarise(seconds)


def _nothing() -> None:
    return None


class CapturedCall(NamedTuple):
    """A CUDA graph of one or several identical calls."""

    graph: torch.cuda.CUDAGraph
    calls: int
    output: Any
    """Return value of the last call; every replay overwrites it."""


def capture(call: Callable[[], Any], calls: int) -> CapturedCall:
    """Captures `calls` consecutive calls, after `WARM_UP` calls that trigger compilation."""
    # Warm-up before a capture must run on a side stream (see the notes on CUDA graphs in torch's documentation).
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
            # Free the memory of the previous call for the next one, as between training steps.
            output = None
            output = call()
    return CapturedCall(graph, calls, output)


def flush_buffer(device: torch.device) -> Tensor:
    """Returns a buffer several times the size of the L2 cache; writing it evicts everything else."""
    size = max(_FLUSH_BYTES, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.uint8, device=device)


def time_replays(captured: CapturedCall, repeats: int, flush: Tensor | None) -> Timing:
    """Times replays with CUDA events.

    Args:
        captured: The graph to replay.
        repeats: Number of measured replays.
        flush: A `flush_buffer` to write before every replay, for a cold L2 cache; None for a warm one.
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


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bandwidth of `Tensor.copy_` in bytes per second, counting both reads and writes.

    Args:
        device: A GPU, or the CPU inside `one_thread`.
        size: Size of the buffer in bytes; much larger than the caches.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)

    def copy() -> Tensor:
        return target.copy_(source)

    if device.type == "cuda":
        timing = time_replays(capture(copy, 1), _COPIES, None)
    else:
        timing = time_call(copy, _COPIES, device)
    return 2 * size / timing.median_us * _MICRO
