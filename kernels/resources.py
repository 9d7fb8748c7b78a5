"""What the kernels take of a GPU: registers, stack and shared memory, found by compiling them ahead of time. Needs no
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

from megatron_prealign.kernels.code_switch import KernelLaunch

CAPABILITIES = (80, 90, 100)
"""A100, H100 and H200, B200."""
_TYPES = {
    "torch.int64": "*i64",
    "torch.int32": "*i32",
    "torch.uint8": "*u8",
    "torch.float32": "*fp32",
}


class KernelResources(NamedTuple):
    """One compiled kernel."""

    kernel: str
    capability: int
    block: int
    warps: int
    registers: int
    """Of a thread."""
    spills: int
    """Instructions that store a register in local memory or load it from there."""
    shared_bytes: int
    """Of a program."""


def kernel_resources(
    launches: Iterable[KernelLaunch], capabilities: Iterable[int] = CAPABILITIES
) -> Iterator[KernelResources]:
    """Compiles every launch for every compute capability.

    Raises:
        RuntimeError: the tool that reads compiled kernels, part of Triton, fails.
    """
    for launch in launches:
        for capability in capabilities:
            yield _compile(launch, capability)


def _compile(launch: KernelLaunch, capability: int) -> KernelResources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in launch.options.items() if name != "num_warps"}
    warps = launch.options["num_warps"]
    given = iter(launch.arguments)
    signature = {name: "constexpr" if name in constants else _type_of(next(given)) for name in launch.kernel.arg_names}
    with warnings.catch_warnings():
        # about a default that integer arithmetic knows nothing of
        warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
        compiled = triton.compile(
            ASTSource(launch.kernel, signature, constants),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": warps},
        )
    registers, spills = _registers_and_spills(compiled.asm["cubin"])
    return KernelResources(
        kernel=launch.kernel.__name__,
        capability=capability,
        block=constants["BLOCK"],
        warps=warps,
        registers=registers,
        spills=spills,
        shared_bytes=compiled.metadata.shared,
    )


def _type_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return _TYPES[str(argument.dtype)]
    return "i32" if -(1 << 31) <= argument < 1 << 31 else "i64"


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = _cuobjdump("-res-usage", file), _cuobjdump("-sass", file)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None or "EXIT" not in code:
        raise RuntimeError(f"cuobjdump told neither registers nor instructions: {usage.strip()[:500]}")
    return int(registers[1]), len(re.findall(r"\b(?:STL|LDL)\b", code))


def _cuobjdump(option: str, file: Path) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # it starts nvdisasm, which lies beside it
    path = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    told = subprocess.run([tools / "cuobjdump", option, file], capture_output=True, text=True, check=False, env=path)
    return told.stdout + told.stderr
