"""Launches the Triton kernels of the contrastive loss: block sizes, scratch memory, surrounding torch operations.
Implements the same two functions as `contrastive_chunked.py`."""

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
    """Block sizes and launch options of a matrix product."""

    rows: int
    columns: int
    depth: int
    """Elements of the inner dimension per iteration."""
    warps: int
    stages: int
    """Pipeline stages: loads in flight, each with its own shared memory."""

    def options(self) -> dict[str, Any]:
        """Constexpr arguments and compiler options of a kernel."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_K": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# These fit into registers on sm_80, sm_90 and sm_100; twice as many columns, or half as many warps, spill
# (tests/kernels/test_contrastive_compile.py). Large tiles read each word less often, small ones occupy every
# multiprocessor when there are few words. Which is fastest on a GPU has not been measured yet.
_TILES = {
    (2, True): Tile(128, 128, 64, warps=8, stages=3),
    (2, False): Tile(64, 64, 64, warps=4, stages=4),
    (4, True): Tile(128, 64, 32, warps=8, stages=3),
    (4, False): Tile(64, 64, 32, warps=4, stages=4),
}
"""Tile by itemsize in bytes and whether it is the large one."""
# The next three are estimates for an H100 or H200, not measured on a GPU yet.
_MULTIPROCESSORS = 132
_WAVES = 8
"""Target number of programs per multiprocessor in forward, so that the last ones leave little of the device idle."""
_SPLITS = 8
"""Column splits of forward if there are enough columns: concurrent programs then share rows and columns, so that few
different words are in use at a time and stay in the L2 cache."""
_MIN_SCRATCH_BYTES = 64 << 20
"""Bytes that the weights of a chunk may take even if the words take less."""
_COLUMN_MULTIPLE = 64
"""The number of columns of the weights is padded to a multiple of this, so that programs need no bounds checks."""
_FLOAT16_SCALE = 2.0**13
"""Scale of weights in float16; scaled weights are below four times this value, well within the range of float16."""


def choose_tile(itemsize: int, rows: int, columns: int, layers: int) -> Tile:
    """Tile for a product with `rows` x `columns` results per layer and inputs of `itemsize` bytes per element."""
    large = _TILES[itemsize, True]
    programs = layers * _blocks(rows, large.rows) * _blocks(columns, large.columns)
    return large if programs >= _MULTIPROCESSORS else _TILES[itemsize, False]


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def row_sums(similarities: Similarities) -> tuple[Tensor, Tensor]:
    """See `contrastive_chunked.row_sums`."""
    launch, log_sums, positive_sums = plan_row_sums(similarities)
    _launch(launch, similarities.columns)
    highest = log_sums.amax(1, keepdim=True)
    return (log_sums - highest).exp2_().sum(1).log2_() + highest[:, 0], positive_sums.sum(1)


def gradients(similarities: Similarities, offsets: Tensor, scale: Tensor) -> Tensor:
    """See `contrastive_chunked.gradients`."""
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
    # Triton launches on the current device, which may differ from that of the tensor
    with torch.cuda.device_of(on):
        launch.kernel[launch.grid](*launch.arguments, **launch.options)


def plan_launches(similarities: Similarities) -> list[KernelLaunch]:
    """Each kernel once, as in forward and the first chunk of backward, without launching: for ahead-of-time
    compilation."""
    forward, *_ = plan_row_sums(similarities)
    _, backward, _ = next(plan_chunks(similarities, _prepare(similarities, similarities.inverse_norms)))
    return [forward, *backward]


def plan_row_sums(similarities: Similarities) -> tuple[KernelLaunch, Tensor, Tensor]:
    """Launch of forward, and its two results for every split of the columns: [L, splits, n]."""
    from megatron_prealign.kernels.contrastive_kernel import row_sums_kernel

    layers, total, hidden = similarities.columns.shape
    tile = choose_tile(similarities.columns.itemsize, similarities.anchors, total, layers)
    blocks, column_tiles = _blocks(similarities.anchors, tile.rows), _blocks(total, tile.columns)
    max_splits = max(_SPLITS, _blocks(_WAVES * _MULTIPROCESSORS, blocks * layers))
    tiles = _blocks(column_tiles, min(max_splits, column_tiles))
    splits = _blocks(column_tiles, tiles)
    log_sums, positive_sums = similarities.inverse_norms.new_empty((2, layers, splits, similarities.anchors))
    arguments = (
        *(similarities.columns, similarities.inverse_norms, similarities.groups.group, log_sums, positive_sums),
        *(total, hidden, similarities.first, similarities.anchors, tiles, LOG2_E / similarities.temperature),
    )
    options = _dot_options(similarities.columns, tile)
    return KernelLaunch(row_sums_kernel, (splits, blocks, layers), arguments, options), log_sums, positive_sums


class _Products(NamedTuple):
    """Values that the weights are multiplied with, and the per-column inputs of the weights."""

    values: Tensor
    """[L, N, H]."""
    factors: Tensor
    """float32 [L, N], factor of the weights of each column before they are stored."""
    unscale: Tensor | float
    """Inverse of the scale in the factors and values."""
    offsets: Tensor
    """float32 [L, N], see `gradients`."""


def _prepare(similarities: Similarities, offsets: Tensor) -> _Products:
    columns, inverse = similarities.columns, similarities.inverse_norms
    if columns.dtype == torch.float32:
        return _Products(columns, inverse, 1.0, offsets)
    # Weights rounded to bfloat16 would use up the error budget of the gradient. float16 has three more bits and is as
    # fast; scaled weights fit its range: none is above twice the maximum of positives, times a factor below 2. Words
    # are scaled only by powers of two, which is exact: what many words have in common nearly cancels in the sums, but
    # its rounding errors would not (measured for aligned or nearly parallel words: errors of 2.0e-3 to 4.4e-3 with
    # rounding, 1.7e-3 without).
    most = similarities.groups.positives.max().clamp(min=1)
    power = torch.exp2(torch.log2(inverse).floor())
    rest = torch.where(inverse > 0, inverse / power, 0)
    scaled = (columns * power.to(columns.dtype)[..., None]).to(torch.float16)
    return _Products(scaled, rest * (_FLOAT16_SCALE / most), most / _FLOAT16_SCALE, offsets)


def plan_chunks(
    similarities: Similarities, products: _Products
) -> Iterator[tuple[slice, tuple[KernelLaunch, KernelLaunch], Tensor]]:
    """Yields for every chunk its range of anchors, two launches, and the sums [L, rows, H] that they compute. The next
    chunk reuses the memory of the sums."""
    columns, values = similarities.columns, products.values
    layers, total, hidden = columns.shape
    stride = _COLUMN_MULTIPLE * _blocks(total, _COLUMN_MULTIPLE)
    height = chunk_rows(similarities, layers * stride * values.itemsize)
    weights = values.new_empty(layers * height * stride)
    sums = similarities.inverse_norms.new_empty(layers * height * hidden)
    for start in range(0, similarities.anchors, height):
        rows = slice(start, min(start + height, similarities.anchors))
        count = rows.stop - rows.start
        weights_launch = _plan_weights(similarities, products, weights, similarities.first + start, count, stride)
        chunk_sums = sums[: layers * count * hidden].view(layers, count, hidden)
        yield rows, (weights_launch, _plan_sums(values, weights, chunk_sums, stride)), chunk_sums


def chunk_rows(similarities: Similarities, row_bytes: int) -> int:
    """Rows of a chunk whose weights take `row_bytes` each: at most as much memory as the words."""
    columns = similarities.columns
    limit = max(columns.numel() * columns.itemsize, _MIN_SCRATCH_BYTES)
    tile_rows = _TILES[columns.itemsize, True].rows
    return min(similarities.anchors, tile_rows * max(1, limit // (row_bytes * tile_rows)))


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
    # row blocks first: concurrent programs share all rows of the chunk and few columns
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
    # tf32x3: three products of ten-bit parts on the tensor cores come close to float32; 16-bit products are exact
    return "tf32x3" if factors.dtype == torch.float32 else "ieee"
