"""The kernels compile for every GPU generation, without a GPU and without spills."""

import pytest
import torch
from support.code_switch_cases import EOD
from support.code_switch_oracle import Dictionary
from support.marks import slow_except

from megatron_prealign.kernels import CodeSwitchBatch, CodeSwitchSettings, build_ngram_table
from megatron_prealign.kernels._triton import HAS_TRITON, INTERPRETED, triton_version
from megatron_prealign.kernels.code_switch import plan_launches
from megatron_prealign.kernels.resources import kernel_resources

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 leaves nothing to compile"),
]


def arguments(longest_key: int, everything: bool, label_mode: str, dtype: torch.dtype) -> dict:
    """As in training: sequences of 4,096 tokens; `everything` turns on all options that cost registers."""
    flags = [7, *[5] * 10, *[4] * 10]
    key = (1, *range(11, 10 + longest_key))
    candidates = [(1, (2, 3), 1.0)] * 4
    dictionary = Dictionary(flags, [0.0, 1.0], {(0, key): candidates}, (EOD,))
    tokens = torch.ones((2, 4096 + 206), dtype=dtype)
    return {
        "batch": CodeSwitchBatch(
            tokens=tokens,
            language=torch.zeros(2, dtype=torch.int64),
            sample_id=torch.zeros(2, dtype=torch.int64),
            word_starts=torch.zeros(tokens.shape, dtype=torch.bool) if everything else None,
        ),
        "table": build_ngram_table(**dictionary.arrays()),
        "thresholds": torch.zeros((2, 2), dtype=torch.int64),
        "settings": CodeSwitchSettings(
            seed=(1 << 64) - 1,
            sequence_length=4096,
            label_mode=label_mode,
            pad_id=EOD,
            eod_id=EOD,
            mask_eod=everything,
            reset_at_eod=everything,
        ),
    }


EVERYTHING, USUAL, SHORT = (
    (8, True, "mix", torch.int64),
    (8, False, "input_only", torch.int64),
    (2, False, "input_only", torch.int32),
)


# The heaviest settings for every generation.
@pytest.mark.parametrize(
    ("capability", "longest_key", "everything", "label_mode", "dtype"),
    slow_except([(80, *EVERYTHING), (90, *EVERYTHING), (100, *EVERYTHING), (90, *USUAL), (100, *SHORT)], (90, *USUAL)),
)
def test_compiles_without_spilling(
    capability: int, longest_key: int, everything: bool, label_mode: str, dtype: torch.dtype
) -> None:
    if capability == 100 and triton_version() < (3, 3):
        pytest.skip("triton 3.2 does not support sm_100")
    launches = plan_launches(**arguments(longest_key, everything, label_mode, dtype))
    found = list(kernel_resources(launches, [capability]))
    assert [each.kernel for each in found] == ["code_switch_row_kernel", "decide_blocks_kernel", "write_blocks_kernel"]
    for each in found:
        print(each)
        # the ptxas of Triton 3.2 to 3.4 spills one or two values of the row kernel in its heaviest settings
        assert each.spills <= (0 if triton_version() >= (3, 9) else 4), each
        # a program must fit: 65,536 registers per multiprocessor, 99 KiB of shared memory on the smallest of these
        assert each.registers * each.warps * 32 <= 65_536, each
        assert each.shared_bytes < 99 * 1024, each
