"""How many processors there are to use."""

import os


def available_cores() -> int:
    """CPU cores that this process may use; a container's share is often less than the machine's."""
    # macOS cannot tell.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
