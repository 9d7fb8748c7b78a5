"""Sets up and tears down a process of a run: device, process groups, seeds, CPU redirection."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_prealign.errors import UserError
from megatron_prealign.recipe import ParallelSection
from megatron_prealign.runtime import gloo, heartbeat
from megatron_prealign.runtime.agreement import open_control_group
from megatron_prealign.runtime.launcher import watch_launcher

# On CUDA, cuBLAS must be configured before its first use to be deterministic, which bit-exact resume relies on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Minimum time that ranks wait for work that one of them does alone, such as the sample index of a large corpus. If a
# rank dies, the wait ends immediately because its connections close.
_PATIENCE_MINUTES = 120.0


@dataclass(frozen=True)
class Runtime:
    """Device, process groups and ranks of this process. Passed explicitly, never read from a global."""

    device: torch.device
    groups: "ProcessGroupCollection"  # type: ignore[name-defined]  # noqa: F821
    parallel: ParallelSection
    rank: int
    world_size: int

    @property
    def tensor_rank(self) -> int:
        return self.groups.tp.rank()

    @property
    def pipeline_rank(self) -> int:
        return self.groups.pp.rank()

    @property
    def data_rank(self) -> int:
        return self.groups.dp.rank()

    @property
    def data_size(self) -> int:
        return self.groups.dp.size()

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.groups.pp.size() - 1

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0


def choose_device(wanted: str) -> torch.device:
    """Returns the device of this process.

    Raises:
        UserError: CUDA is requested but not available, or the node has fewer GPUs than processes.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "parallel.device is cuda, but torch finds no GPU; set it to auto or cpu, or run `megatron-prealign doctor`"
        )
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"no GPU for local rank {local_rank}: this node has {torch.cuda.device_count()} GPUs and each process "
            "needs one; "
            f"lower --nproc-per-node to at most {torch.cuda.device_count()}"
        )
    return torch.device("cuda", local_rank)


def _init_process_group(device: torch.device, timeout: timedelta) -> None:
    if dist.is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
        if backend == "gloo":
            # A rank that ends at once, such as for a user error, would close connections that others are still making;
            # those would report the connections instead of the error.
            dist.barrier()
    else:
        # Without torchrun: a single-process group with an in-memory store, which needs no free port.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


@contextmanager
def running(
    parallel: ParallelSection, *, seed: int, control_timeout_minutes: float = 0.0, leave_process_group: bool = False
) -> Iterator[Runtime]:
    """Calls `start`, and `stop` when the block succeeds.

    After an error only Megatron-Core's groups are destroyed: other ranks may wait in a collective that this one will
    never join, and destroying the process group would wait for them under NCCL instead of reporting the error.
    """
    runtime = start(parallel, seed=seed, control_timeout_minutes=control_timeout_minutes)
    try:
        yield runtime
    except BaseException:
        stop(leave_process_group=True)
        raise
    stop(leave_process_group=leave_process_group)


def start(parallel: ParallelSection, *, seed: int, control_timeout_minutes: float = 0.0) -> Runtime:
    """Joins the process group, builds Megatron-Core's groups for `parallel` and seeds the random states.

    Under torchrun it uses the environment's RANK and WORLD_SIZE, otherwise a single-process group. Call `stop` before
    calling it again with another layout in the same processes.

    Args:
        control_timeout_minutes: Longest time that one rank may work alone (`checkpoint.timeout_minutes`) while the
            others wait for it; the collectives of training keep `parallel.distributed_timeout_minutes`.

    Raises:
        UserError: No GPU although one is requested, or the world size is not a multiple of the model-parallel size.
    """
    watch_launcher()
    device = choose_device(parallel.device)
    if parallel.tensor_model_parallel_size > 1:
        # Lets Megatron-Core's tensor-parallel communication start before the kernel it overlaps with. CUDA reads it
        # only once.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    gloo.share_device()
    _init_process_group(device, timeout)
    world_size = dist.get_world_size()
    if world_size % parallel.model_parallel_size:
        error = UserError(
            f"the number of processes is {world_size}, expected a multiple of "
            f"parallel.tensor_model_parallel_size x pipeline_model_parallel_size ({parallel.model_parallel_size}); "
            "change --nproc-per-node or the parallel section"
        )
        error.agreed = True
        raise error
    heartbeat.start(dist.get_rank(), world_size, timeout_s=timeout.total_seconds())
    # A minute more than the work may take, so that the rank whose time is up reports the error.
    patience = max(parallel.distributed_timeout_minutes, control_timeout_minutes, _PATIENCE_MINUTES) + 1.0
    open_control_group(timedelta(minutes=patience))
    if device.type == "cpu":
        from megatron_prealign.runtime import cpu

        cpu.enable()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed + 100 * stage)
    # Stages draw different dropout masks, as in Megatron-LM; tensor-parallel ranks agree where activations are not
    # sharded.
    model_parallel_cuda_manual_seed((seed + 100 * stage) % 2**31, force_reset_rng=True)
    return Runtime(
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        parallel=parallel,
        rank=dist.get_rank(),
        world_size=world_size,
    )


def stop(*, leave_process_group: bool = False) -> None:
    """Destroys Megatron-Core's groups and, unless `leave_process_group`, the process group."""
    from megatron.core import parallel_state

    heartbeat.stop()
    parallel_state.destroy_model_parallel()
    if not leave_process_group and dist.is_initialized():
        dist.destroy_process_group()
