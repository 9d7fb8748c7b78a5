"""Checks the installation part by part; a check cannot crash or hang the others.

Heavy libraries such as torch are imported only in child processes, because importing a broken build can kill or block
the process.
"""

import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from megatron_prealign.doctor.probe import ProbeError, gloo_sum, probe

Status = Literal["ok", "warn", "fail"]

DEADLINE_S = 150.0
GIB = 2**30

# Distribution -> minimum version, as in setup.py.
LIBRARIES = {
    "numpy": "1.0",
    "jsonargparse": "4.52",
    "docstring-parser": "0.15",
    "PyYAML": "5.0",
    "safetensors": "0.4",
    "orjson": "3.9",
    "pyarrow": "14",
    "zstandard": "0.21",
    "xxhash": "3.2",
    "tqdm": "4.66",
    "tensorboard": "2.14",
    "matplotlib": "3.8",
}


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    part: str
    status: Status
    """ok, warn (works with limitations) or fail (something the package needs is broken)."""
    found: str
    fix: str = ""
    """Recommended action; empty if none is needed."""


Check = Callable[[], Finding]


def release(version: str) -> tuple[int, ...]:
    """Returns the release numbers of a version: (2, 13, 0) for `2.13.0+cpu`.

    Raises:
        ValueError: the version does not start with a number.
    """
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise ValueError(f"version is {version!r}, expected it to start with a number")
    return tuple(int(part) for part in match.group().split("."))


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether a top-level module can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except ValueError:
        # A module inserted into sys.modules by hand has no spec.
        return True


def check_python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if (3, 10) <= sys.version_info[:2] < (3, 14):
        return Finding("Python", "ok", found)
    return Finding("Python", "fail", found, "create an environment with Python 3.10 to 3.13")


def check_torch() -> Finding:
    version = installed_version("torch")
    if version is None:
        return Finding("torch", "fail", "not installed", 'pip install "torch>=2.6"')
    if release(version) < (2, 6):
        return Finding("torch", "fail", f"{version}, expected 2.6 or later", 'pip install "torch>=2.6"')
    info = probe("import torch; result(version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip)")
    build = f"CUDA {info['cuda']}" if info["cuda"] else f"ROCm {info['hip']}" if info["hip"] else "CPU"
    return Finding("torch", "ok", f"{info['version']}, {build} build")


def check_megatron_core() -> Finding:
    part, fix = "Megatron-Core", 'pip install "megatron-core>=0.16.1,<0.17"'
    version = installed_version("megatron-core")
    if version is None and not is_importable("megatron"):
        return Finding(part, "fail", "not installed", fix)
    if version is None:
        # A checkout on PYTHONPATH has no distribution metadata.
        version = str(probe("import megatron.core; result(version=megatron.core.__version__)")["version"])
    if not (0, 16, 1) <= release(version) < (0, 17):
        return Finding(part, "fail", f"{version}, expected 0.16.1 or later and below 0.17", fix)
    core = probe(
        "import megatron.core\n"
        "try:\n    import megatron.core.datasets.helpers_cpp\n    result(helpers=True)\n"
        "except ImportError:\n    result(helpers=False)"
    )
    if not core["helpers"]:
        found = f"{version} without its compiled dataset helpers (megatron.core.datasets.helpers_cpp)"
        return Finding(part, "fail", found, "install the wheel instead of a source checkout: " + fix)
    return Finding(part, "ok", version)


def check_psutil() -> Finding:
    version = installed_version("psutil")
    if version is None:
        return Finding(
            "psutil",
            "fail",
            "not installed; Megatron-Core's checkpointing imports it without declaring it",
            "pip install psutil",
        )
    probe("import psutil; result(cpus=psutil.cpu_count())")
    return Finding("psutil", "ok", version)


def check_triton() -> Finding:
    """Checks Triton, with which torch compiles Megatron-Core's fused element-wise functions on a GPU."""
    reason = "Megatron-Core's fused functions cannot be compiled for the GPU"
    version = installed_version("triton")
    if version is None and not is_importable("triton"):
        if not _nvidia_gpus():
            return Finding("Triton", "ok", "not installed; not needed without a GPU")
        return Finding("Triton", "fail", f"not installed; {reason}", 'pip install "triton>=3.2" (Linux)')
    version = str(probe("import triton; result(version=triton.__version__)")["version"])
    if release(version) < (3, 2):
        found, fix = f"{version}, expected 3.2 or later", "upgrade torch, which depends on a matching Triton"
        if not _nvidia_gpus():
            return Finding("Triton", "warn", f"{found} on a machine with a GPU", fix)
        return Finding("Triton", "fail", f"{found}; {reason}", fix)
    return Finding("Triton", "ok", version)


def check_compiler() -> Finding:
    """Checks for a C compiler, with which Triton builds its launcher before the first kernel runs."""
    compiler = next(
        (path for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and (path := shutil.which(name))), None
    )
    if compiler:
        return Finding("C compiler", "ok", compiler)
    if not _nvidia_gpus():
        return Finding("C compiler", "ok", "not found; not needed without a GPU")
    return Finding(
        "C compiler",
        "fail",
        "not found; Triton cannot launch kernels without one, so the first step on the GPU fails",
        "install gcc, or set CC to a C compiler",
    )


def check_transformer_engine() -> Finding:
    part = "Transformer Engine"
    if not is_importable("transformer_engine"):
        return Finding(part, "ok", "not installed (optional, GPU only): torch layers are used")
    try:
        engine = probe(
            "import transformer_engine, transformer_engine.pytorch; result(version=transformer_engine.__version__)"
        )
    except ProbeError as error:
        return Finding(
            part,
            "fail",
            f"installed but cannot be imported: {error}",
            "pip uninstall transformer-engine, or install the build for this torch and CUDA",
        )
    return Finding(part, "ok", str(engine["version"]))


def check_apex() -> Finding:
    if not is_importable("apex"):
        return Finding("Apex", "ok", "not installed (optional, GPU only): torch's fused AdamW is used")
    try:
        probe("from apex.optimizers import FusedAdam; result()")
    except ProbeError as error:
        return Finding(
            "Apex",
            "fail",
            f"a package named apex is installed without FusedAdam ({error}); the one on PyPI is not NVIDIA's",
            "pip uninstall apex; NVIDIA Apex is optional and built from its GitHub source",
        )
    return Finding("Apex", "ok", "NVIDIA Apex with FusedAdam")


def check_gpus() -> Finding:
    listed = _nvidia_gpus()
    info = probe(
        "import torch, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]\n"
        "    usable = torch.cuda.is_available()\n"
        "    if usable:\n        torch.ones(2, device='cuda').sum().item()\n"
        "result(names=names, usable=usable, cuda=torch.version.cuda, warnings=[str(w.message) for w in caught])"
    )
    if info["usable"]:
        counts = {name: info["names"].count(name) for name in info["names"]}
        gpus = ", ".join(f"{count} x {name}" for name, count in counts.items())
        return Finding("GPU", "ok", f"{gpus}; driver {listed[0][1] if listed else 'unknown'}")
    if not listed:
        return Finding("GPU", "warn", "none; runs use the CPU, which is only for tests and small studies", "")
    found = f"{len(listed)} x {listed[0][0]}, driver {listed[0][1]}, but torch cannot use it"
    if not info["cuda"]:
        return Finding("GPU", "fail", f"{found}: a CPU build of torch", "install the CUDA build of torch")
    reason = info["warnings"][0] if info["warnings"] else "no reason given"
    return Finding(
        "GPU", "fail", f"{found}: {reason}", "install a driver that matches torch's CUDA, check CUDA_VISIBLE_DEVICES"
    )


def check_gloo() -> Finding:
    fix = "set GLOO_SOCKET_IFNAME to a working interface (lo for one machine) and let /etc/hosts resolve the host name"
    try:
        total = gloo_sum()
    except ProbeError as error:
        return Finding("gloo", "fail", f"all-reduce between two processes failed: {error}", fix)
    if total != 3.0:
        return Finding("gloo", "fail", f"all-reduce of 1 and 2 returned {total}, expected 3", "reinstall torch")
    return Finding("gloo", "ok", "all-reduce between two processes succeeded")


def check_nccl() -> Finding:
    version = probe(
        "import torch, torch.distributed as d\n"
        "available = d.is_available() and d.is_nccl_available()\n"
        "result(version=list(torch.cuda.nccl.version()) if available else None)"
    )["version"]
    if version:
        return Finding("NCCL", "ok", ".".join(str(part) for part in version))
    if _nvidia_gpus():
        return Finding(
            "NCCL",
            "fail",
            "not in this build of torch; multi-GPU training is not possible",
            "install the CUDA build of torch",
        )
    return Finding("NCCL", "ok", "not in this build of torch; not needed without a GPU")


def check_tokenizer_libraries() -> Finding:
    return _check_versions(
        "tokenizer libraries",
        {"tokenizers": "0.20", "transformers": "4.46", "sentencepiece": "0.2", "protobuf": "3.20"},
    )


def check_libraries() -> Finding:
    return _check_versions("other libraries", LIBRARIES)


def check_disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    found = f"{_gib(usage.free)} free of {_gib(usage.total)} at {Path.cwd()}"
    fix = "free disk space or set logging.run_dir to a larger disk: checkpoints take about 16 bytes per parameter"
    if usage.free < GIB:
        return Finding("disk", "fail", found, fix)
    return Finding("disk", "warn", found, fix) if usage.free < 20 * GIB else Finding("disk", "ok", found)


def check_shared_memory() -> Finding:
    path = Path("/dev/shm")
    if not path.is_dir():
        return Finding("/dev/shm", "ok", "none on this system")
    usage = shutil.disk_usage(path)
    found = f"{_gib(usage.free)} free of {_gib(usage.total)}"
    if usage.free < GIB:
        fix = "start the container with --shm-size=8g: NCCL uses it for communication between processes of one machine"
        return Finding("/dev/shm", "warn", found, fix)
    return Finding("/dev/shm", "ok", found)


CHECKS: dict[str, Check] = {
    "Python": check_python,
    "torch": check_torch,
    "Megatron-Core": check_megatron_core,
    "psutil": check_psutil,
    "tokenizer libraries": check_tokenizer_libraries,
    "other libraries": check_libraries,
    "GPU": check_gpus,
    "NCCL": check_nccl,
    "gloo": check_gloo,
    "Triton": check_triton,
    "C compiler": check_compiler,
    "Transformer Engine": check_transformer_engine,
    "Apex": check_apex,
    "disk": check_disk,
    "/dev/shm": check_shared_memory,
}


def run_checks(checks: dict[str, Check] | None = None, deadline_s: float = DEADLINE_S) -> Iterator[Finding]:
    """Runs all checks concurrently and yields their findings in order, each as soon as it is available.

    A check that raises, or that has not finished `deadline_s` seconds after the start, is a `fail`.
    """
    checks = CHECKS if checks is None else checks
    findings: dict[str, Finding] = {}
    # At most two children import torch at a time: more would only wait for each other on a small machine.
    slots = threading.Semaphore(2)

    def work(part: str, check: Check) -> None:
        with slots:
            findings[part] = _run_check(part, check)

    # Daemon threads, so that one stuck on a dead file system does not keep the process from exiting.
    threads = [threading.Thread(target=work, args=item, daemon=True) for item in checks.items()]
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.start()
    timed_out = f"timed out after {deadline_s:g} s"
    fix = "check for a hanging file system or driver, then run megatron-prealign doctor again"
    for part, thread in zip(checks, threads, strict=True):
        thread.join(max(0.0, end - time.monotonic()))
        yield findings.get(part) or Finding(part, "fail", timed_out, fix)


def _run_check(part: str, check: Check) -> Finding:
    try:
        return check()
    except ProbeError as error:
        return Finding(part, "fail", str(error), "reinstall it in this environment")
    except Exception as error:
        # The doctor runs on broken machines, so any exception is a finding.
        return Finding(part, "fail", f"{type(error).__name__}: {error}".splitlines()[0], "see the message")


def _check_versions(part: str, required: dict[str, str]) -> Finding:
    versions = {name: installed_version(name) for name in required}
    missing = [name for name, version in versions.items() if version is None]
    old = [
        f"{name} {version} (expected {required[name]} or later)"
        for name, version in versions.items()
        if version is not None and release(version) < release(required[name])
    ]
    if missing or old:
        found = "; ".join(
            f"{kind}: {', '.join(names)}" for kind, names in (("not installed", missing), ("too old", old)) if names
        )
        packages = " ".join(f'"{name}>={required[name]}"' for name in [*missing, *(entry.split()[0] for entry in old)])
        return Finding(part, "fail", found, f"pip install {packages}")
    return Finding(part, "ok", ", ".join(f"{name} {version}" for name, version in versions.items()))


def _nvidia_gpus() -> Sequence[tuple[str, str]]:
    """Name and driver version of each GPU that nvidia-smi lists; empty without nvidia-smi."""
    from megatron_prealign.doctor.probe import run_command

    if shutil.which("nvidia-smi") is None:
        return []
    try:
        output = run_command(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], timeout_s=20.0)
    except ProbeError:
        return []
    rows = [line.rsplit(",", 1) for line in output.splitlines() if "," in line]
    return [(name.strip(), driver.strip()) for name, driver in rows]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
