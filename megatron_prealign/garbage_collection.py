"""Python's cycle collector out of the way of work that makes millions of objects and no cycles."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
