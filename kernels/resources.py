"""GPU resources used by the kernels (registers, spills, shared memory), from ahead-of-time compilation without a
GPU."""

import os
import re
import subprocess
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from torch import Tensor

from megatron_prealign.kernels._triton import KernelLaunch, triton_version

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""
_BLOCKS = ("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K")
_ALIGNMENT = 16
"""Divisibility of addresses (in bytes) and integers for which Triton specialises a kernel."""
_COMPILER_OPTIONS = ("num_warps", "num_stages")
_TYPES = {
    "torch.int64": "*i64",
    "torch.int32": "*i32",
    "torch.uint8": "*u8",
    "torch.float32": "*fp32",
    "torch.float16": "*fp16",
    "torch.bfloat16": "*bf16",
}


class KernelResources(NamedTuple):
    """Resources of one compiled kernel."""

    kernel: str
    capability: int
    block: str
    """Block size of a program: positions of a sequence, or rows x columns x depth of a product."""
    warps: int
    registers: int
    """Registers per thread."""
    spills: int
    """Number of instructions that store registers to local memory or load them back."""
    shared_bytes: int
    """Shared memory per program."""


def kernel_resources(
    launches: Iterable[KernelLaunch], capabilities: Iterable[int] = CAPABILITIES
) -> Iterator[KernelResources]:
    """Compiles every launch for every compute capability.

    Raises:
        RuntimeError: cuobjdump, which is part of Triton, fails.
    """
    for launch in launches:
        for capability in capabilities:
            yield _compile(launch, capability)


def _compile(launch: KernelLaunch, capability: int) -> KernelResources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: value for name, value in launch.options.items() if name in _COMPILER_OPTIONS}
    constants = {name: value for name, value in launch.options.items() if name not in options}
    arguments = iter(launch.arguments)
    signature, attributes = {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        signature[parameter.name] = "constexpr"
        if parameter.name not in constants:
            argument = next(arguments)
            signature[parameter.name] = _type_of(argument)
            if not parameter.do_not_specialize and _is_aligned(argument):
                attributes[(index,)] = [["tt.divisibility", _ALIGNMENT]]
    with warnings.catch_warnings():
        # about a floating-point default that does not affect integer arithmetic
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        compiled = triton.compile(
            # attributes in the format of Triton 3.3
            ASTSource(launch.kernel, signature, constants, attributes if triton_version() >= (3, 3) else None),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
    registers, spills = _registers_and_spills(compiled.asm["cubin"])
    return KernelResources(
        kernel=launch.kernel.__name__,
        capability=capability,
        block="x".join(str(value) for name, value in constants.items() if name in _BLOCKS),
        warps=options["num_warps"],
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
    )


def _type_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return _TYPES[str(argument.dtype)]
    if isinstance(argument, float):
        return "fp32"
    return "i32" if -(1 << 31) <= argument < 1 << 31 else "i64"


def _is_aligned(argument: Any) -> bool:
    if isinstance(argument, float):
        return False
    return (argument.data_ptr() if isinstance(argument, Tensor) else argument) % _ALIGNMENT == 0


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    with TemporaryDirectory() as directory:
        file = Path(directory) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = _cuobjdump("-res-usage", file), _cuobjdump("-sass", file)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or "EXIT" not in code:
        raise RuntimeError(f"cuobjdump: no registers or instructions in its output: {usage.strip()[:500]}")
    return int(registers[1]), len(re.findall(r"\b(?:STL|LDL)\b", code))


def _cuobjdump(option: str, file: Path) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # cuobjdump runs nvdisasm, which is in the same directory
    path = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([tools / "cuobjdump", option, file], capture_output=True, text=True, check=False, env=path)
    return done.stdout + done.stderr
