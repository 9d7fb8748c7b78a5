"""Peak memory of a call."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.resources import release_memory

_PROCESS = Path("/proc/self")


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory in use during `call`, minus the memory in use before it.

    On a GPU this is memory allocated by torch; on a CPU the resident memory of the process, or None if the system does
    not report it (only Linux does).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Return freed memory to the system first: a call that reuses it would seem to need none.
    release_memory()
    try:
        # Resets the high-water mark to the memory in use now.
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")
        before = _high_water()
        call()
        return _high_water() - before
    except OSError:
        return None


def _high_water() -> int:
    for line in (_PROCESS / "status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")
