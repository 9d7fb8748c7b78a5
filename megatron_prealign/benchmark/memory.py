"""How much memory a call takes on top of what was there before."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_prealign.resources import release_memory

_PROCESS = Path("/proc/self")


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that was in use during `call`, less what was in use before it.

    On a GPU it is what torch's allocator handed out; on a CPU what the process had in main memory, None where the
    system does not tell (other than Linux).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # A call that uses again what was freed before would take no memory.
    release_memory()
    try:
        # sets the high-water mark back to what is in use now
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
    raise OSError("no VmHWM in /proc/self/status")
