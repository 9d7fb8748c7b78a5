"""Asynchronous copies from host memory to the device."""

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from host memory to the device without synchronising with it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
