"""Gloo groups that share a device: they compute the same, with fewer threads, on the interfaces that the user chose."""

import os

import pytest
from support.workers import WorkerPool

GROUPS = 12


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
