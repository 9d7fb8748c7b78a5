"""The kernels of the contrastive loss compile for every GPU generation, without a GPU and without spills."""

import pytest
import torch
from support.marks import slow_except

from megatron_prealign.kernels._triton import HAS_TRITON, INTERPRETED, triton_version
from megatron_prealign.kernels.contrastive_interface import Similarities, word_groups
from megatron_prealign.kernels.contrastive_launch import plan_launches
from megatron_prealign.kernels.resources import kernel_resources

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
]


SHAPES = {"few": (256, 256), "many": (8192, 2048), "odd": (8192, 2000)}
# Every shape for every generation, in either dtype; `benchmark resources` lists the other combinations.
CASES = [
    (capability, (torch.float32, torch.bfloat16)[(number + place) % 2], shape)
    for number, capability in enumerate((80, 90, 100))
    for place, shape in enumerate(SHAPES)
]


@pytest.mark.parametrize(("capability", "dtype", "shape"), slow_except(CASES, (90, torch.float32, "many")))
def test_compiles_without_spilling(capability: int, dtype: torch.dtype, shape: str) -> None:
    words, hidden = SHAPES[shape]
    if capability == 100 and triton_version() < (3, 3):
        pytest.skip("triton 3.2 does not support sm_100")
    with torch.device("meta"):
        columns, norms = torch.empty((1, words, hidden), dtype=dtype), torch.empty((1, words))
        groups = word_groups(torch.arange(words))
    similarities = Similarities(columns, norms, groups, 0, words, temperature=0.1)
    found = list(kernel_resources(plan_launches(similarities), [capability]))
    assert [each.kernel for each in found] == ["row_sums_kernel", "weights_kernel", "weighted_sums_kernel"]
    for each in found:
        print(each)
        assert each.block.startswith("64x64x" if words == 256 else "128x"), each
        # masks for a hidden size that is not a multiple of the tile's depth spill a few registers on sm_100
        assert each.spills <= (80 if capability == 100 and hidden == 2000 else 0), each
        # a program must fit: 65,536 registers per multiprocessor, 99 KiB of shared memory on the smallest of these
        assert each.registers * each.warps * 32 <= 65_536, each
        assert each.shared_bytes < 99 * 1024, each
