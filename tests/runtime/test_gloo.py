"""Gloo groups that share a device: they compute the same, with fewer threads, on the interfaces that the user chose."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta

import pytest
from support.workers import WorkerPool

GROUPS = 12
# A process that has closed its groups forks one that opens a group.
FORKING = """
import os
import torch
import torch.distributed as dist
from megatron_prealign.runtime import gloo
def run():
    gloo.share_device()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
run()
if (child := os.fork()) == 0:
    run()
    os._exit(7)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def sums_and_threads(interface: str | None) -> tuple[list[float], int, int]:
    """Runs in workers: sums over several groups, the number of threads that each group started, and of devices."""
    import torch
    import torch.distributed as dist

    from megatron_prealign.runtime import gloo

    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    try:
        gloo.share_device()
        gloo.share_device()
        first = dist.new_group()
        dist.barrier(first)
        before = len(os.listdir("/proc/self/task"))
        groups = [dist.new_group() for _ in range(GROUPS)]
        started = len(os.listdir("/proc/self/task")) - before
        sums = []
        for number, group in enumerate(groups):
            value = torch.tensor([float(dist.get_rank() + number)])
            dist.all_reduce(value, group=group)
            sums.append(value.item())
        return sums, started, len(gloo._devices(dist.distributed_c10d.ProcessGroupGloo))
    finally:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)


@pytest.mark.parametrize(("interface", "devices"), [(None, 1), ("lo", 1), ("lo,lo", 2)])
def test_groups_share_their_devices(workers: WorkerPool, interface: str | None, devices: int) -> None:
    for sums, started, opened in workers.run(2, sums_and_threads, interface):
        assert sums == [1.0 + 2 * number for number in range(GROUPS)]
        # Two threads that compute for each group and device, and none that waits for the network.
        assert started == 2 * devices * GROUPS
        assert opened == devices


def timeouts() -> tuple[timedelta, timedelta]:
    """Runs in workers: the timeout of a new group, and the one set later."""
    import torch
    import torch.distributed as dist

    from megatron_prealign.runtime import gloo

    gloo.share_device()
    group = dist.new_group(timeout=timedelta(seconds=50))
    # What the C++ group hands out, which is not the object that was made in Python.
    backend = group._get_backend(torch.device("cpu"))
    first = backend.options._timeout
    # As Megatron-Core's `update_pg_timeout`; torch looks for groups of the class that it knows.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=7), group)
    return first, backend.options._timeout


def test_the_timeout_of_a_group_can_be_set_later(workers: WorkerPool) -> None:
    assert workers.run(1, timeouts) == [(timedelta(seconds=50), timedelta(seconds=7))]


def own_devices() -> list[int]:
    """Runs in workers: devices of groups that a caller made with options or arguments of its own."""
    import torch.distributed as dist

    from megatron_prealign.runtime import gloo

    gloo.share_device()
    gloo_class = dist.ProcessGroupGloo
    options = gloo_class._Options()
    options._devices = [gloo_class.create_device(interface="lo"), gloo_class.create_device(interface="lo")]
    options._threads = 1
    groups = [
        gloo_class(dist.HashStore(), 0, 1, options),
        gloo_class(dist.HashStore(), 0, 1, timedelta(seconds=5)),
        gloo_class(store=dist.HashStore(), rank=0, size=1, timeout=timedelta(seconds=5)),
    ]
    return [len(group.options._devices) for group in groups]


def test_options_of_the_caller_are_kept(workers: WorkerPool) -> None:
    assert workers.run(1, own_devices) == [[2, 1, 1]]


def test_a_forked_process_has_a_device_of_its_own() -> None:
    # In a fork, to close a device of the parent would wait for ever.
    process = subprocess.Popen([sys.executable, "-c", FORKING], start_new_session=True)
    try:
        assert process.wait(60) == 7
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
