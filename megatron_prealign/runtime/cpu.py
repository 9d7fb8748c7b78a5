"""Lets Megatron-Core, which expects CUDA, run on a CPU with gloo.

`runtime.distributed.start` enables it once per process when the device is a CPU; on CUDA it is not used.
Megatron-Core 0.16.1 refers to CUDA in four ways, all of which are redirected here:

- `device="cuda"` and device integers in tensor constructors, `Tensor.cuda()`, `Tensor.to("cuda")`;
- `Tensor.type() == "torch.cuda.FloatTensor"`, by which the optimizers distinguish dtypes;
- `torch.cuda.current_device()` and `torch.cuda.synchronize()`;
- the CUDA random states behind its RNG tracker.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


def _is_cuda(device: object) -> bool:
    if isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


class _CudaToCpuMode(TorchFunctionMode):
    """Replaces every CUDA device by the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = (args[0], *("cpu" if isinstance(a, str | torch.device) and _is_cuda(a) else a for a in args[1:]))
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


_active: _CudaToCpuMode | None = None


def enable() -> None:
    """Redirects CUDA calls of this process to the CPU permanently. Idempotent."""
    global _active
    if _active is not None:
        return
    import megatron.core.tensor_parallel.random as megatron_random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.synchronize = lambda device=None: None
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    _SharedGeneratorTracker.install(megatron_random)
    _active = _CudaToCpuMode()
    _active.__enter__()


class _SharedGeneratorTracker:
    """Silences the RNG tracker's warning that the CPU state changed inside a fork, since here the CPU state is the one
    that is forked."""

    @staticmethod
    def install(megatron_random: Any) -> None:
        import logging

        class _DropCpuRngWarning(logging.Filter):
            def filter(self, record: logging.LogRecord) -> bool:
                return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

        logging.getLogger(megatron_random.__name__).addFilter(_DropCpuRngWarning())
