"""How the Triton kernels of the contrastive loss are launched: block sizes, scratch memory, and what torch does around
them. The same two functions as `contrastive_chunked.py` has."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_prealign.kernels._triton import KernelLaunch
from megatron_prealign.kernels.contrastive_chunked import project
from megatron_prealign.kernels.contrastive_interface import LOG2_E, Similarities


@dataclass(frozen=True)
class Tile:
    """How a product is cut into programs."""

    rows: int
    columns: int
    depth: int
    """Summed over at a time."""
    warps: int
    stages: int
    """Loads in flight, each with shared memory of its own."""

    def options(self) -> dict[str, Any]:
        """Constants of a kernel."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# What the compiler keeps in registers for sm_80, sm_90 and sm_100; twice as many columns, or half as many warps, spill
# (tests/kernels/test_contrastive_compile.py). Large tiles read each word less often, small ones give every
# multiprocessor something to do where words are few. Which is fastest on a GPU is not measured yet.
_TILES = {
    (2, True): Tile(128, 128, 64, warps=8, stages=3),
    (2, False): Tile(64, 64, 64, warps=4, stages=4),
    (4, True): Tile(128, 64, 32, warps=8, stages=3),
    (4, False): Tile(64, 64, 32, warps=4, stages=4),
}
"""By bytes of a number, and whether the large one is meant."""
# The next three are estimates for an H100 or H200, not measured on a GPU yet.
_MULTIPROCESSORS = 132
_WAVES = 8
"""Programs for each multiprocessor that forward aims at: the last ones then leave little of the device idle."""
_SPLITS = 8
"""Column splits of forward where there are columns enough: programs that run at a time then share rows and columns, so
few different words are in use at a time and stay in the L2."""
_LEAST_SCRATCH = 64 << 20
"""Bytes that the weights of a strip may take even where the words take less."""
_WHOLE_COLUMNS = 64
"""Weights are stored for a multiple of so many columns, so that no program asks whether it is past the end."""
_FLOAT16_ROOM = 2.0**13
"""Four times this is well inside the range of float16."""


def choose_tile(itemsize: int, rows: int, columns: int, layers: int) -> Tile:
    """The tile for a product of `rows` x `columns` results a layer, summed over numbers of `itemsize` bytes."""
    large = _TILES[itemsize, True]
    programs = layers * _blocks(rows, large.rows) * _blocks(columns, large.columns)
    return large if programs >= _MULTIPROCESSORS else _TILES[itemsize, False]


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def row_sums(similarities: Similarities) -> tuple[Tensor, Tensor]:
    """As `contrastive_chunked.row_sums`."""
    launch, log_sums, positive_sums = plan_row_sums(similarities)
    _launch(launch, similarities.columns)
    highest = log_sums.amax(1, keepdim=True)
    return (log_sums - highest).exp2_().sum(1).log2_() + highest[:, 0], positive_sums.sum(1)


def gradients(similarities: Similarities, offsets: Tensor, scale: Tensor) -> Tensor:
    """As `contrastive_chunked.gradients`."""
    columns = similarities.columns
    result = torch.empty_like(columns[:, similarities.own])
    products = _prepare(similarities, offsets)
    inverse = similarities.inverse_norms[:, similarities.own, None]
    for rows, launches, sums in plan_chunks(similarities, products):
        for launch in launches:
            _launch(launch, columns)
        own = slice(similarities.first + rows.start, similarities.first + rows.stop)
        factor = inverse[:, rows] * scale[:, None, None] * products.unscale
        result[:, rows] = project(sums, columns[:, own] * inverse[:, rows]).mul_(factor)
    return result


def _launch(launch: KernelLaunch, on: Tensor) -> None:
    # Triton launches on the current device, which need not be the tensor's
    with torch.cuda.device_of(on):
        launch.kernel[launch.grid](*launch.arguments, **launch.options)


def plan_launches(similarities: Similarities) -> list[KernelLaunch]:
    """Every kernel once, as forward and the first strip of backward launch it, launching none: for compiling them ahead
    of time."""
    forward, *_ = plan_row_sums(similarities)
    _, backward, _ = next(plan_chunks(similarities, _prepare(similarities, similarities.inverse_norms)))
    return [forward, *backward]


def plan_row_sums(similarities: Similarities) -> tuple[KernelLaunch, Tensor, Tensor]:
    """The launch of forward, and its two results for every split of the columns: [L, splits, n]."""
    from megatron_prealign.kernels.contrastive_kernel import row_sums_kernel

    layers, total, hidden = similarities.columns.shape
    tile = choose_tile(similarities.columns.itemsize, similarities.anchors, total, layers)
    blocks, column_tiles = _blocks(similarities.anchors, tile.rows), _blocks(total, tile.columns)
    wanted = max(_SPLITS, _blocks(_WAVES * _MULTIPROCESSORS, blocks * layers))
    tiles = _blocks(column_tiles, min(wanted, column_tiles))
    splits = _blocks(column_tiles, tiles)
    log_sums, positive_sums = similarities.inverse_norms.new_empty((2, layers, splits, similarities.anchors))
    arguments = (
        *(similarities.columns, similarities.inverse_norms, similarities.groups.group, log_sums, positive_sums),
        *(total, hidden, similarities.first, similarities.anchors, tiles, LOG2_E / similarities.temperature),
    )
    options = _dot_options(similarities.columns, tile)
    return KernelLaunch(row_sums_kernel, (splits, blocks, layers), arguments, options), log_sums, positive_sums


class _Products(NamedTuple):
    """What the weights of a strip are multiplied with, and the numbers of every column that the weights need."""

    values: Tensor
    """[L, N, H]."""
    factors: Tensor
    """float32 [L, N], what the weights of a column are multiplied with before they are stored."""
    unscale: Tensor | float
    """Makes up for the factors."""
    offsets: Tensor
    """float32 [L, N], as `gradients` is given them."""


def _prepare(similarities: Similarities, offsets: Tensor) -> _Products:
    columns, inverse = similarities.columns, similarities.inverse_norms
    if columns.dtype == torch.float32:
        return _Products(columns, inverse, 1.0, offsets)
    # Weights rounded to bfloat16 would be as far off as the whole gradient may be. float16 has three bits more and is
    # as fast; weights made to fit suit its range: none is above twice the most positives, times a factor below 2. Words
    # are scaled by a power of two alone, which keeps their bits: what many words share nearly cancels in the sums, and
    # rounding it would not (measured: errors of 2.0e-3 to 4.4e-3 for aligned or nearly parallel words, 1.7e-3 so).
    most = similarities.groups.positives.max().clamp(min=1)
    power = torch.exp2(torch.log2(inverse).floor())
    rest = torch.where(inverse > 0, inverse / power, 0)
    scaled = (columns * power.to(columns.dtype)[..., None]).to(torch.float16)
    return _Products(scaled, rest * (_FLOAT16_ROOM / most), most / _FLOAT16_ROOM, offsets)


def plan_chunks(
    similarities: Similarities, products: _Products
) -> Iterator[tuple[slice, tuple[KernelLaunch, KernelLaunch], Tensor]]:
    """For every strip its rows among the anchors, two launches, and the sums [L, rows, H] that these leave. The memory
    of the sums serves the next strip too."""
    columns, values = similarities.columns, products.values
    layers, total, hidden = columns.shape
    stride = _WHOLE_COLUMNS * _blocks(total, _WHOLE_COLUMNS)
    height = chunk_rows(similarities, layers * stride * values.itemsize)
    weights = values.new_empty(layers * height * stride)
    sums = similarities.inverse_norms.new_empty(layers * height * hidden)
    for start in range(0, similarities.anchors, height):
        rows = slice(start, min(start + height, similarities.anchors))
        count = rows.stop - rows.start
        weigh = _plan_weights(similarities, products, weights, similarities.first + start, count, stride)
        strip_sums = sums[: layers * count * hidden].view(layers, count, hidden)
        yield rows, (weigh, _plan_sums(values, weights, strip_sums, stride)), strip_sums


def chunk_rows(similarities: Similarities, row_bytes: int) -> int:
    """Rows of a strip whose weights take `row_bytes` each: as much memory as the words at most."""
    columns = similarities.columns
    room = max(columns.numel() * columns.itemsize, _LEAST_SCRATCH)
    whole = _TILES[columns.itemsize, True].rows
    return min(similarities.anchors, whole * max(1, room // (row_bytes * whole)))


def _plan_weights(
    similarities: Similarities, products: _Products, weights: Tensor, first: int, rows: int, stride: int
) -> KernelLaunch:
    from megatron_prealign.kernels.contrastive_kernel import weights_kernel

    layers, total, hidden = similarities.columns.shape
    tile = choose_tile(similarities.columns.itemsize, rows, stride, layers)
    arguments = (
        *(similarities.columns, similarities.inverse_norms, similarities.groups.group),
        *(products.offsets, products.factors, weights),
        *(total, hidden, first, rows, stride, LOG2_E / similarities.temperature),
    )
    # row blocks come first: programs that run at a time share all rows of the strip and few columns
    grid = (_blocks(rows, tile.rows), _blocks(stride, tile.columns), layers)
    return KernelLaunch(weights_kernel, grid, arguments, _dot_options(similarities.columns, tile))


def _plan_sums(values: Tensor, weights: Tensor, sums: Tensor, stride: int) -> KernelLaunch:
    from megatron_prealign.kernels.contrastive_kernel import weighted_sums_kernel

    layers, rows, hidden = sums.shape
    tile = choose_tile(values.itemsize, rows, hidden, layers)
    grid = (_blocks(hidden, tile.columns), _blocks(rows, tile.rows), layers)
    arguments = (values, weights, sums, values.shape[1], hidden, rows, stride)
    return KernelLaunch(weighted_sums_kernel, grid, arguments, {"PRECISION": _precision(values), **tile.options()})


def _dot_options(columns: Tensor, tile: Tile) -> dict[str, Any]:
    return {"PRECISION": _precision(columns), "EVEN": columns.shape[2] % tile.depth == 0, **tile.options()}


def _precision(factors: Tensor) -> str:
    # three products of ten-bit parts on the tensor cores come close to float32; 16-bit numbers are exact by themselves
    return "tf32x3" if factors.dtype == torch.float32 else "ieee"
