"""Availability of Triton: the package imports without it, and all other code checks here whether it can be used."""

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
    """Tensors and scalars, in the order of the kernel's parameters."""
    options: dict[str, Any]
    """Constexpr values by name, and compiler options such as num_warps."""


def runs_triton(device: torch.device) -> bool:
    """Whether kernels can be launched on tensors of `device`."""
    return HAS_TRITON and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


def triton_version() -> tuple[int, int]:
    """Major and minor version of Triton.

    Raises:
        PackageNotFoundError: Triton is not installed.
    """
    major, minor = version("triton").split(".")[:2]
    return int(major), int(minor)
