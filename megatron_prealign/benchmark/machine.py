"""Machine and version info that is reported with every measurement."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import megatron_prealign
from megatron_prealign.doctor.probe import ProbeError, run_command
from megatron_prealign.resources import available_cores
from megatron_prealign.text import plural

_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Machine and software of a measurement; empty strings for what is not available."""

    gpu: str
    """Name of the GPU."""
    capability: str
    """Its compute capability, `90` for an H200."""
    driver: str
    cuda: str
    """CUDA version that torch was built for."""
    cpu: str
    """Model name of the CPU."""
    cores: int
    """CPU cores that this process may use."""
    load: str
    """Load average of the minute before the measurement; well above 0 means that others use the machine, too."""
    python: str
    torch: str
    triton: str
    version: str
    """Version of this package."""
    commit: str
    """Commit of its checkout, with `-dirty` if tracked files differ from it."""
    date: str
    """Date and time in UTC."""

    def lines(self) -> list[str]:
        """Returns a human-readable description."""
        if self.gpu:
            gpu = f"{self.gpu}, compute capability {self.capability}, driver {self.driver or 'unknown'}"
        else:
            gpu = "none in use"
        commit = f", commit {self.commit}" if self.commit else ""
        return [
            f"GPU       {gpu}",
            f"CPU       {self.cpu}, {plural(self.cores, 'core')}, load {self.load or 'unknown'}",
            f"versions  megatron-prealign {self.version}{commit}, torch {self.torch}, "
            f"triton {self.triton or 'not installed'}, CUDA {self.cuda or 'none'}, Python {self.python}",
            f"date      {self.date}",
        ]


def describe_machine(device: torch.device) -> Machine:
    """Collects the current machine info.

    Args:
        device: Device of the measurement; the GPU is only described if the measurement runs on it.
    """
    gpu = capability = driver = ""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu, capability = properties.name, f"{properties.major}{properties.minor}"
        driver = _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return Machine(
        gpu=gpu,
        capability=capability,
        driver=driver,
        cuda=torch.version.cuda or "",
        cpu=_cpu_model(),
        cores=available_cores(),
        load=_load(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_installed("triton"),
        version=megatron_prealign.__version__,
        commit=_commit(),
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _first_line(command: list[str]) -> str:
    """Returns the first line that a command prints; empty if it fails."""
    try:
        lines = run_command(command, _TIMEOUT_S).splitlines()
    except ProbeError:
        return ""
    return lines[0].strip() if lines else ""


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load() -> str:
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except OSError:
        return ""


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    package = Path(megatron_prealign.__file__).resolve().parent
    git = ["git", "-C", str(package)]
    # If the package is installed in an environment inside another checkout, the commit of that checkout is unrelated.
    if _first_line([*git, "rev-parse", "--show-toplevel"]) != str(package.parent):
        return ""
    commit = _first_line([*git, "rev-parse", "--short=12", "HEAD"])
    changed = _first_line([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if commit and changed else commit
