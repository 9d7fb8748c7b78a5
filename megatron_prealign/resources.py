"""The machine's resources: CPU cores, Python's cycle collector, freed memory, huge pages."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def without_cycle_collector() -> Iterator[None]:
    """Switches the cycle collector off; what no cycle holds is freed as ever.

    It looks at all containers again and again as their number grows: 10 to 15% of the time of a dictionary build, 17 to
    32% of that of parsing Python sources.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def release_memory() -> None:
    """Has the C library give freed memory back to the system, which glibc else keeps for the process; does nothing with
    others."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def use_huge_pages() -> None:
    """Asks torch for large pages of main memory; call it before torch makes its first tensor.

    Each tensor is new memory, and the kernel hands that out page by page: reading tensors of 1 GB from cached files
    went at 1.9 GB/s, with large pages at 10.8 (two x86-64 cores, torch 2.13). Where the kernel has none, nothing
    changes.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def available_cores() -> int:
    """CPU cores that this process may use; a container's share is often less than the machine's."""
    # macOS cannot tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
