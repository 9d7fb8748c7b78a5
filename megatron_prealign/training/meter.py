"""Sums metrics on the device between log lines, so that no training step synchronises with the host."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_prealign.runtime.distributed import Runtime


def max_over_ranks(value: float, runtime: Runtime) -> float:
    """Largest value of all ranks. Collective: call on all ranks (one collective, one host sync)."""
    largest = torch.tensor(value, dtype=torch.float64, device=runtime.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


class Meter:
    """Named sums in one float64 vector on the device.

    Each rank adds its part; the metric is the sum over data-parallel ranks and pipeline stages. Tensor-parallel ranks
    add the same value, which is counted once, unless the value is split over them.
    """

    def __init__(self, sizes: Mapping[str, int], runtime: Runtime) -> None:
        """`sizes` maps each name to its number of entries."""
        self._runtime = runtime
        self._slices: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            self._slices[name] = slice(start, start + size)
            start += size
        self._sums = torch.zeros(start, dtype=torch.float64, device=runtime.device)

    def add(
        self, name: str, value: torch.Tensor, *, index: int | None = None, split_over_tensor_ranks: bool = False
    ) -> None:
        """Adds a scalar (at `index`, or to a name of size one) or a vector of the name's size."""
        if self._runtime.tensor_rank and not split_over_tensor_ranks:
            return
        where = self._slices[name]
        if index is not None:
            where = slice(where.start + index, where.start + index + 1)
        self._sums[where] += value.detach()

    def drain(self) -> dict[str, list[float]]:
        """Returns the sums over all ranks since the last call. Collective: call on all ranks (two collectives, one host
        sync)."""
        sums = self._sums.clone()
        dist.all_reduce(sums, group=self._runtime.groups.tp_dp_cp)
        dist.all_reduce(sums, group=self._runtime.groups.pp)
        self._sums.zero_()
        values = sums.tolist()
        return {name: values[where] for name, where in self._slices.items()}
