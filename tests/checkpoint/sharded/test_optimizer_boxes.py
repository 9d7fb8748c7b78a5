"""Splitting a range of a flat tensor into boxes of the tensor."""

import math

import numpy as np
import pytest

from megatron_prealign.checkpoint.sharded.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (4, 3), (1, 5), (5, 1), (2, 3, 4), (3, 1, 2, 2)])
def test_every_range_is_covered_once_and_in_order(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    full = np.arange(numel).reshape(shape)
    for start in range(numel):
        for end in range(start + 1, numel + 1):
            parts = list(boxes(shape, start, end))
            assert len(parts) <= 2 * len(shape) - 1
            flat = []
            for offsets, sizes, at in parts:
                index = tuple(slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True))
                box = full[index].reshape(-1)
                assert box[0] == at
                flat += box.tolist()
            assert flat == list(range(start, end))
