"""Takes and gives back this process's random states, Megatron-Core's tracker included."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def capture() -> dict[str, Any]:
    """All random states of this process: Python's, NumPy's, torch's on CPU and device, and the tracker's."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def restore(states: dict[str, Any]) -> None:
    """Continues every generator where `capture` found it. The device must be of the same type as it was then."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])
