"""Checks the installation part by part; no check can crash or hang the others.

Imports nothing heavy: torch and its like are imported in child processes, since a broken build may kill or block the
process that imports it.
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

# Distribution -> least version, as setup.py asks for them.
LIBRARIES = {
    "numpy": "1.0",
    "jsonargparse": "4.52",
    "docstring-parser": "0.15",
    "PyYAML": "5.0",
    "safetensors": "0.4",
    "orjson": "3.9",
    "tqdm": "4.66",
    "tensorboard": "2.14",
    "matplotlib": "3.8",
}


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    part: str
    status: Status
    """ok, warn (works, but worse than it could) or fail (something the package needs is broken)."""
    found: str
    fix: str = ""
    """What to do; empty when there is nothing to do."""


Check = Callable[[], Finding]


def release(version: str) -> tuple[int, ...]:
    """The numbers a version starts with: `2.13.0+cpu` is (2, 13, 0).

    Raises:
        ValueError: no number there.
    """
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise ValueError(f"version {version!r} starts with no number")
    return tuple(int(part) for part in match.group().split("."))


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution; None when absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def is_importable(module: str) -> bool:
    """Whether a top-level module lies on the path, without importing it."""
    try:
        return find_spec(module) is not None
    except ValueError:
        # a module put into sys.modules by hand has no spec
        return True


def check_python() -> Finding:
    found = f"{sys.version.split()[0]} at {sys.executable}"
    if (3, 10) <= sys.version_info[:2] < (3, 14):
        return Finding("Python", "ok", found)
    return Finding("Python", "fail", found, "make an environment with Python 3.10 to 3.13")


def check_torch() -> Finding:
    version = installed_version("torch")
    if version is None:
        return Finding("torch", "fail", "not installed", 'pip install "torch>=2.6"')
    if release(version) < (2, 6):
        return Finding("torch", "fail", f"{version}, needs 2.6 or later", 'pip install "torch>=2.6"')
    answer = probe("import torch; answer(version=torch.__version__, cuda=torch.version.cuda, hip=torch.version.hip)")
    build = f"CUDA {answer['cuda']}" if answer["cuda"] else f"ROCm {answer['hip']}" if answer["hip"] else "CPU"
    return Finding("torch", "ok", f"{answer['version']}, {build} build")


def check_megatron_core() -> Finding:
    part, fix = "Megatron-Core", 'pip install "megatron-core>=0.16.1,<0.17"'
    version = installed_version("megatron-core")
    if version is None and not is_importable("megatron"):
        return Finding(part, "fail", "not installed", fix)
    if version is None:
        # a checkout on PYTHONPATH has no distribution to ask
        version = str(probe("import megatron.core; answer(version=megatron.core.__version__)")["version"])
    if not (0, 16, 1) <= release(version) < (0, 17):
        return Finding(part, "fail", f"{version}, needs 0.16.1 or later and below 0.17", fix)
    answer = probe(
        "import megatron.core\n"
        "try:\n    import megatron.core.datasets.helpers_cpp\n    answer(helpers=True)\n"
        "except ImportError:\n    answer(helpers=False)"
    )
    if not answer["helpers"]:
        reason = f"{version} without its compiled dataset helpers (megatron.core.datasets.helpers_cpp)"
        return Finding(part, "fail", reason, "install the wheel instead of a source checkout: " + fix)
    return Finding(part, "ok", version)


def check_psutil() -> Finding:
    version = installed_version("psutil")
    if version is None:
        return Finding(
            "psutil", "fail", "not installed; Megatron-Core's checkpoints need it undeclared", "pip install psutil"
        )
    probe("import psutil; answer(cpus=psutil.cpu_count())")
    return Finding("psutil", "ok", version)


def check_triton() -> Finding:
    """Megatron-Core's fused element-wise parts are compiled by torch through Triton, on a GPU only."""
    why = "Megatron-Core's fused parts cannot be compiled for the GPU"
    version = installed_version("triton")
    if version is None and not is_importable("triton"):
        if not _nvidia_gpus():
            return Finding("Triton", "ok", "not installed; not needed without a GPU")
        return Finding("Triton", "fail", f"not installed; {why}", 'pip install "triton>=3.2" (Linux)')
    answer = probe("import triton; answer(version=triton.__version__)")
    if release(answer["version"]) < (3, 2):
        found, fix = f"{answer['version']}, needs 3.2 or later", "upgrade torch, which brings its Triton"
        if not _nvidia_gpus():
            return Finding("Triton", "warn", f"{found} on a machine with a GPU", fix)
        return Finding("Triton", "fail", f"{found}; {why}", fix)
    return Finding("Triton", "ok", str(answer["version"]))


def check_compiler() -> Finding:
    """Nothing of ours is compiled, but Triton builds its launcher with a C compiler before the first kernel runs."""
    compiler = next(
        (path for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and (path := shutil.which(name))), None
    )
    if compiler:
        return Finding("C compiler", "ok", compiler)
    if not _nvidia_gpus():
        return Finding("C compiler", "ok", "none; not needed without a GPU")
    return Finding(
        "C compiler",
        "fail",
        "none; Triton cannot start a kernel without one, so the first step on the GPU fails",
        "install gcc, or set CC to a C compiler",
    )


def check_transformer_engine() -> Finding:
    part = "Transformer Engine"
    if not is_importable("transformer_engine"):
        return Finding(part, "ok", "not installed (optional, GPU only): torch layers are used")
    try:
        answer = probe(
            "import transformer_engine, transformer_engine.pytorch; answer(version=transformer_engine.__version__)"
        )
    except ProbeError as error:
        return Finding(
            part,
            "fail",
            f"installed but does not import: {error}",
            "pip uninstall transformer-engine, or install the build for this torch and CUDA",
        )
    return Finding(part, "ok", str(answer["version"]))


def check_apex() -> Finding:
    if not is_importable("apex"):
        return Finding("Apex", "ok", "not installed (optional, GPU only): torch's fused AdamW is used")
    try:
        probe("from apex.optimizers import FusedAdam; answer()")
    except ProbeError as error:
        return Finding(
            "Apex",
            "fail",
            f"a package named apex is there without FusedAdam ({error}); the one on PyPI is not NVIDIA's",
            "pip uninstall apex; NVIDIA's is built from its GitHub source, and is optional",
        )
    return Finding("Apex", "ok", "NVIDIA Apex with FusedAdam")


def check_deepspeed() -> Finding:
    if not is_importable("deepspeed"):
        return Finding("DeepSpeed", "ok", "not installed (optional, only for the ZeRO engine)")
    try:
        answer = probe("import deepspeed; answer(version=deepspeed.__version__)")
    except ProbeError as error:
        return Finding(
            "DeepSpeed",
            "warn",
            f"installed but does not import: {error}",
            'pip install "deepspeed>=0.15", or uninstall it',
        )
    if release(answer["version"]) < (0, 15):
        return Finding(
            "DeepSpeed", "warn", f"{answer['version']}, needs 0.15 or later", 'pip install "deepspeed>=0.15"'
        )
    return Finding("DeepSpeed", "ok", str(answer["version"]))


def check_gpus() -> Finding:
    seen = _nvidia_gpus()
    answer = probe(
        "import torch, warnings\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]\n"
        "    usable = torch.cuda.is_available()\n"
        "    if usable:\n        torch.ones(2, device='cuda').sum().item()\n"
        "answer(names=names, usable=usable, cuda=torch.version.cuda, why=[str(w.message) for w in caught])"
    )
    if answer["usable"]:
        counts = {name: answer["names"].count(name) for name in answer["names"]}
        gpus = ", ".join(f"{count} x {name}" for name, count in counts.items())
        return Finding("GPU", "ok", f"{gpus}; driver {seen[0][1] if seen else 'unknown'}")
    if not seen:
        return Finding("GPU", "warn", "none; runs go over the CPU, for tests and small studies", "")
    found = f"{len(seen)} x {seen[0][0]}, driver {seen[0][1]}, but torch cannot use it"
    if not answer["cuda"]:
        return Finding("GPU", "fail", f"{found}: a CPU build of torch", "install the CUDA build of torch")
    why = answer["why"][0] if answer["why"] else "no reason given"
    return Finding(
        "GPU", "fail", f"{found}: {why}", "install a driver that matches torch's CUDA, check CUDA_VISIBLE_DEVICES"
    )


def check_gloo() -> Finding:
    fix = "set GLOO_SOCKET_IFNAME to a working interface (lo for one machine) and let /etc/hosts resolve the host name"
    try:
        total = gloo_sum()
    except ProbeError as error:
        return Finding("gloo", "fail", f"two processes cannot talk: {error}", fix)
    if total != 3.0:
        return Finding("gloo", "fail", f"two processes summed 1 + 2 to {total}", "reinstall torch")
    return Finding("gloo", "ok", "two processes summed over it")


def check_nccl() -> Finding:
    answer = probe(
        "import torch, torch.distributed as d\n"
        "there = d.is_available() and d.is_nccl_available()\n"
        "answer(version=list(torch.cuda.nccl.version()) if there else None)"
    )
    if answer["version"]:
        return Finding("NCCL", "ok", ".".join(str(part) for part in answer["version"]))
    if _nvidia_gpus():
        return Finding(
            "NCCL", "fail", "not in this torch; several GPUs cannot work together", "install the CUDA build of torch"
        )
    return Finding("NCCL", "ok", "not in this torch; not needed without a GPU")


def check_tokenizer_libraries() -> Finding:
    return _libraries(
        "tokenizer libraries",
        {"tokenizers": "0.20", "transformers": "4.46", "sentencepiece": "0.2", "protobuf": "3.20"},
    )


def check_libraries() -> Finding:
    return _libraries("other libraries", LIBRARIES)


def check_disk() -> Finding:
    usage = shutil.disk_usage(Path.cwd())
    found = f"{_gib(usage.free)} free of {_gib(usage.total)} at {Path.cwd()}"
    fix = "free some space, or set logging.run_dir to a larger disk: checkpoints hold about 16 bytes a parameter"
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
        fix = "start the container with --shm-size=8g: data workers and NCCL on one machine share memory there"
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
    "DeepSpeed": check_deepspeed,
    "disk": check_disk,
    "/dev/shm": check_shared_memory,
}


def run_checks(checks: dict[str, Check] | None = None, deadline_s: float = DEADLINE_S) -> Iterator[Finding]:
    """Runs all checks side by side, each on its own; yields their findings in order, each as soon as it can.

    A check that raises, or that has not answered `deadline_s` seconds after the start, becomes a `fail`.
    """
    checks = CHECKS if checks is None else checks
    findings: dict[str, Finding] = {}
    # two children import torch at a time: more only wait for each other on a small machine
    slots = threading.Semaphore(2)

    def work(part: str, check: Check) -> None:
        with slots:
            findings[part] = _isolated(part, check)

    # daemon threads: one stuck on a dead file system must not keep the process from ending
    threads = [threading.Thread(target=work, args=item, daemon=True) for item in checks.items()]
    end = time.monotonic() + deadline_s
    for thread in threads:
        thread.start()
    late = f"no answer within {deadline_s:g} s"
    fix = "look for a stuck file system or driver, then run the doctor again"
    for part, thread in zip(checks, threads, strict=True):
        thread.join(max(0.0, end - time.monotonic()))
        yield findings.get(part) or Finding(part, "fail", late, fix)


def _isolated(part: str, check: Check) -> Finding:
    try:
        return check()
    except ProbeError as error:
        return Finding(part, "fail", str(error), "reinstall it in this environment")
    except Exception as error:
        # the doctor is there for broken machines: whatever breaks is a finding
        return Finding(part, "fail", f"{type(error).__name__}: {error}".splitlines()[0], "see the message")


def _libraries(part: str, needed: dict[str, str]) -> Finding:
    versions = {name: installed_version(name) for name in needed}
    missing = [name for name, version in versions.items() if version is None]
    old = [
        f"{name} {version} (needs {needed[name]})"
        for name, version in versions.items()
        if version is not None and release(version) < release(needed[name])
    ]
    if missing or old:
        found = "; ".join(
            f"{kind}: {', '.join(names)}" for kind, names in (("not installed", missing), ("too old", old)) if names
        )
        packages = " ".join(f'"{name}>={needed[name]}"' for name in [*missing, *(entry.split()[0] for entry in old)])
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
