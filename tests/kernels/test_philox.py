"""Philox 4x32-10 against published test vectors, plain Python and Triton."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.code_switch_oracle import philox
from support.messages import user_error

from megatron_prealign.kernels import philox_4x32_10

# the philox4x32-10 lines of Random123's known-answer file: counter, key, result
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def run(counter: tuple, key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    return philox_4x32_10(tuple(torch.as_tensor(each, dtype=torch.int64) for each in counter), key)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    assert tuple(int(each) for each in run(counter, key)) == expected
    assert philox(counter, key) == expected


def test_equals_plain_python_with_broadcast_counters() -> None:
    generator = np.random.default_rng(0)
    positions = np.arange(7)
    low, high = generator.integers(0, 1 << 32, (2, 3))
    key = (0xDEADBEEF, 0x12345678)
    result = run((positions[None, :], low[:, None], high[:, None], np.zeros((3, 1))), key)
    for row in range(3):
        for position in positions:
            expected = philox((int(position), int(low[row]), int(high[row]), 0), key)
            assert tuple(int(each[row, position]) for each in result) == expected


def test_every_output_bit_is_fair() -> None:
    count = 1 << 14
    words = run((np.arange(count), [0], [0], [0]), (1, 2))
    for word in words:
        ones = (word[:, None] >> torch.arange(32) & 1).sum(dim=0)
        # 6 standard deviations of a fair coin: 32 x 4 bits pass by chance with probability 1 - 3e-7
        assert bool(((ones - count / 2).abs() < 6 * (count / 4) ** 0.5).all())


def test_key_out_of_range() -> None:
    with user_error("key words", 1 << 32, "2^32-1", kind=ValueError):
        run(([0], [0], [0], [0]), (1 << 32, 0))


TRITON_SCRIPT = """
import torch, triton, triton.language as tl
from megatron_prealign.kernels import philox_4x32_10

@triton.jit
def kernel(counters, out, seed_low, seed_high, N: tl.constexpr):
    i = tl.arange(0, N)
    c0 = tl.load(counters + i).to(tl.uint32, bitcast=True)
    c1 = tl.load(counters + N + i).to(tl.uint32, bitcast=True)
    seed = seed_low.to(tl.uint64) | (seed_high.to(tl.uint64) << 32)
    r0, r1, r2, r3 = tl.philox(seed, c0, c1, c0 * 0, c0 * 0)
    tl.store(out + i, r0.to(tl.int32, bitcast=True))
    tl.store(out + N + i, r1.to(tl.int32, bitcast=True))
    tl.store(out + 2 * N + i, r2.to(tl.int32, bitcast=True))
    tl.store(out + 3 * N + i, r3.to(tl.int32, bitcast=True))

generator = torch.Generator().manual_seed(0)
counters = torch.randint(-2**31, 2**31, (2, 64), generator=generator, dtype=torch.int64)
out = torch.empty(4, 64, dtype=torch.int32)
kernel[(1,)](counters.int(), out, 123456789, 987654321, N=64)
zero = torch.zeros(64, dtype=torch.int64)
words = counters & 0xFFFFFFFF
expected = philox_4x32_10((words[0], words[1], zero, zero), (123456789, 987654321))
assert torch.equal(out.long() & 0xFFFFFFFF, torch.stack(expected))
"""


@pytest.mark.slow
def test_equals_triton(tmp_path) -> None:
    pytest.importorskip("triton")
    script = tmp_path / "compare.py"
    script.write_text(TRITON_SCRIPT)
    # the interpreter is selected when triton is imported, hence a separate process
    done = subprocess.run(
        [sys.executable, str(script)], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
