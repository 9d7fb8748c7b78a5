"""Arbitrary bytes as an .idx file: either every sequence can be read, or the error is one line."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.messages import assert_refused

from megatron_prealign import cli
from megatron_prealign.data.indexed import check_indexed, open_indexed, write_index
from megatron_prealign.errors import UserError

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
QUICK = settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])


def opens(prefix: Path) -> bool:
    """Whether the files open: then Megatron-Core must read every sequence, otherwise the error must be one line."""
    try:
        check_indexed(prefix)
    except UserError as error:
        assert str(prefix) in str(error)
        assert len(str(error).splitlines()) == 1
        return False
    dataset = open_indexed(prefix)
    assert sum(len(dataset[number]) for number in range(len(dataset))) * dataset.index.dtype_size == (
        Path(f"{prefix}.bin").stat().st_size
    )
    return True


@pytest.mark.slow
@QUICK
@given(index=st.binary(max_size=120), tokens=st.binary(max_size=16))
@example(b"", b"")
@example(MAGIC, b"")
def test_any_bytes(tmp_path: Path, index: bytes, tokens: bytes) -> None:
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(tokens)
    assert not opens(tmp_path / "a")


@pytest.mark.slow
@QUICK
@given(
    version=st.sampled_from([1, 1, 1, 0, 2, 2**64 - 1]),
    code=st.integers(0, 10),
    sequences=st.one_of(st.integers(0, 5), st.sampled_from([2**31, 2**32, 2**60, 2**63, 2**64 - 1])),
    boundaries=st.one_of(st.integers(0, 6), st.sampled_from([2**31, 2**61, 2**64 - 1])),
    body=st.lists(st.integers(-2, 6).map(lambda n: struct.pack("<i", n)), max_size=40).map(b"".join),
    tokens=st.integers(0, 24),
)
@example(1, 4, 0, 0, b"", 0)
@example(1, 4, 0, 1, bytes(8), 0)
@example(1, 4, 1, 2, bytes(20) + struct.pack("<q", 1), 0)
@example(1, 4, 1, 0, struct.pack("<iq", 1, 0), 4)
def test_any_header(
    tmp_path: Path, version: int, code: int, sequences: int, boundaries: int, body: bytes, tokens: int
) -> None:
    (tmp_path / "a.idx").write_bytes(HEADER.pack(MAGIC, version, code, sequences, boundaries) + body)
    (tmp_path / "a.bin").write_bytes(bytes(tokens))
    opens(tmp_path / "a")


@pytest.mark.slow
@QUICK
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    dtype=st.sampled_from([np.uint16, np.int32]),
    offset=st.integers(0, 400),
    value=st.binary(min_size=1, max_size=8),
    cut=st.integers(0, 3),
)
def test_a_corrupt_index(tmp_path: Path, lengths: list[int], dtype: type, offset: int, value: bytes, cut: int) -> None:
    write_index(tmp_path / "a.idx", dtype, np.array(lengths, dtype=np.int32))
    np.arange(sum(lengths), dtype=dtype).tofile(tmp_path / "a.bin")
    good = (tmp_path / "a.idx").read_bytes()
    assert opens(tmp_path / "a") == (sum(lengths) > 0)
    bad = bytearray(good)
    bad[offset : offset + len(value)] = value[: max(len(good) - offset, 0)]
    bad = bad[: len(bad) - cut]
    (tmp_path / "a.idx").write_bytes(bad)
    # Only an index of the same size may still open.
    assert opens(tmp_path / "a") <= (len(bad) == len(good))


@pytest.mark.parametrize("content", [b"", b"\0", b"garbage" * 20, MAGIC, MAGIC + bytes(25)])
def test_what_is_no_index_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "a.idx").write_bytes(content)
    (tmp_path / "a.bin").write_bytes(content)
    status = cli.main(["dataset", "inspect", "--input", str(tmp_path / "a")])
    assert_refused(status, capsys.readouterr().err, "error: ")
    assert cli.main(["dataset", "verify", "--input", str(tmp_path / "a")]) == 1
    output = capsys.readouterr()
    assert output.out.startswith(f"problem: {tmp_path / 'a'}") and not output.err
