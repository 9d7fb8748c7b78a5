"""The one gate to Triton: the kernels import without it, and everything else asks here whether it can be used."""

import importlib.util
import os
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Whether Triton is installed. On a CPU-only machine it often is not."""

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on tensors in host memory. Triton reads the variable when it is first
imported, so setting it later changes nothing."""


class KernelLaunch(NamedTuple):
    """One launch of a Triton kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    """Tensors and numbers, in the kernel's order."""
    options: dict[str, Any]
    """Constants by name, and how the compiler is to go about it, such as the number of warps."""


def runs_triton(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of `device`."""
    return HAS_TRITON and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


def triton_version() -> tuple[int, int]:
    """Major and minor version of Triton.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    major, minor = version("triton").split(".")[:2]
    return int(major), int(minor)
