"""Reading compressed files in chunks: completely, in little memory, and corrupt data never looks like an end."""

import bz2
import gzip
import random
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from support.messages import assert_facts, user_error

from megatron_prealign.corpus.read_errors import ReadError
from megatron_prealign.corpus.streams import read_chunks

_random = random.Random(0)
# Text that compresses about threefold, longer than a few blocks of every format.
TEXT = b"".join(b"%d %x\n" % (n, _random.getrandbits(24)) for n in range(150_000))


def zst(data: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def skippable(data: bytes) -> bytes:
    return b"\x5a\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "zst": zst}
NAMES = {"gz": "gzip", "bz2": "bz2", "zst": "zstd"}


def read(path: Path, compression: str, chunk_bytes: int = 1 << 20) -> tuple[bytes, ReadError | None]:
    """The data before the end or the error, and the error."""
    pieces: list[bytes] = []
    position = 0
    try:
        for piece, now in read_chunks(str(path), compression, chunk_bytes):
            assert 0 < len(piece) <= chunk_bytes
            assert position <= now <= path.stat().st_size
            position = now
            pieces.append(piece)
    except ReadError as error:
        assert error.where == str(path) and "\n" not in str(error)
        return b"".join(pieces), error
    assert position == path.stat().st_size
    return b"".join(pieces), None


@pytest.mark.parametrize("compression", PACK)
@pytest.mark.parametrize("chunk_bytes", [1000, 1 << 17, 1 << 30])
def test_complete_files(tmp_path: Path, compression: str, chunk_bytes: int) -> None:
    path = tmp_path / "a"
    path.write_bytes(PACK[compression](TEXT))
    assert read(path, compression, chunk_bytes) == (TEXT, None)


@pytest.mark.parametrize("compression", NAMES)
@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7])
def test_tiny_pieces(tmp_path: Path, compression: str, chunk_bytes: int) -> None:
    # Such text decompresses to more than a chunk: all of it must come out, also at the end.
    path, text = tmp_path / "a", b"ab" * 700
    path.write_bytes(PACK[compression](text))
    assert read(path, compression, chunk_bytes) == (text, None)


@pytest.mark.parametrize("compression", NAMES)
def test_files_of_several_parts(tmp_path: Path, compression: str) -> None:
    path, pack = tmp_path / "a", PACK[compression]
    parts = [TEXT[:300_000], b"", TEXT[300_000:300_001], TEXT[300_001:]]
    path.write_bytes(b"".join(map(pack, parts)) + (bytes(70_000) if compression != "zst" else b""))
    assert read(path, compression) == (TEXT, None)


def test_all_forms_of_zstd(tmp_path: Path) -> None:
    path = tmp_path / "a"
    streamed = zstandard.ZstdCompressor(write_checksum=True, threads=2).compressobj()
    parts = [
        zst(TEXT[:1000], write_checksum=True, write_content_size=False),
        skippable(b"a table of contents" * 10_000),
        streamed.compress(TEXT[1000:400_000]) + streamed.flush(),
        skippable(b""),
        # Repeated bytes and incompressible bytes have their own block types.
        zst(bytes(200_000)),
        zst(_random.randbytes(0) + bytes(range(256)) * 2),
    ]
    path.write_bytes(b"".join(parts))
    assert read(path, "zst") == (TEXT[:400_000] + bytes(200_000) + bytes(range(256)) * 2, None)


@pytest.mark.parametrize("compression", NAMES)
def test_data_before_a_truncation_is_read(tmp_path: Path, compression: str) -> None:
    data, path = PACK[compression](TEXT), tmp_path / "a"
    for size in (1, 3, 5, 12, len(data) // 2, len(data) - 9, len(data) - 1):
        path.write_bytes(data[:size])
        found, error = read(path, compression)
        assert error is not None, size
        assert_facts(error.why, f"truncated {NAMES[compression]} data")
        assert TEXT.startswith(found)
        if size > 12:
            # An incomplete block is lost: 900 kB of bz2, 128 KiB of zstd.
            assert len(found) > len(TEXT) * size / len(data) - (900_000 if compression == "bz2" else 150_000)
    # Also after a complete part.
    path.write_bytes(data + data[: len(data) // 2])
    found, error = read(path, compression)
    assert found.startswith(TEXT) and error is not None


@pytest.mark.slow
@pytest.mark.parametrize("compression", NAMES)
def test_corrupt_data_is_never_an_end(tmp_path: Path, compression: str) -> None:
    data, path = PACK[compression](TEXT) if compression != "zst" else zst(TEXT, write_checksum=True), tmp_path / "a"
    generator = random.Random(1)
    for _ in range(20):
        at = generator.randrange(10, len(data) - 40)
        path.write_bytes(data[:at] + bytes(byte ^ 0x55 for byte in data[at : at + 30]) + data[at + 30 :])
        assert read(path, compression)[1] is not None, at
    for garbage in (b"plain text, wrongly named" * 100, data + b"text behind it", data + data[1:]):
        path.write_bytes(garbage)
        found, error = read(path, compression)
        assert error is not None
        assert_facts(error.why, f"corrupt {NAMES[compression]} data (")
        assert found == (b"" if garbage.startswith(b"plain") else TEXT)


def test_random_bytes_after_a_valid_start(tmp_path: Path) -> None:
    path, generator = tmp_path / "a", random.Random(2)
    for compression, pack in PACK.items():
        if compression:
            for _ in range(100):
                start = generator.randrange(4, 20)
                path.write_bytes(pack(TEXT[:5000])[:start] + generator.randbytes(generator.randrange(300)))
                assert read(path, compression)[1] is not None


@pytest.mark.slow
@pytest.mark.parametrize("compression", NAMES)
def test_memory_does_not_depend_on_the_decompressed_size(tmp_path: Path, compression: str) -> None:
    path, size = tmp_path / "a", 64 << 20
    path.write_bytes(PACK[compression](bytes(size)))
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert sum(len(piece) for piece, _ in read_chunks(str(path), compression, 1 << 18)) == size
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_missing_zstd_dictionary(tmp_path: Path) -> None:
    dictionary = zstandard.train_dictionary(2000, [TEXT[at : at + 300] for at in range(0, 300_000, 300)])
    path = tmp_path / "a"
    path.write_bytes(zstandard.ZstdCompressor(dict_data=dictionary).compress(TEXT[:1000]))
    found, error = read(path, "zst")
    assert found == b"" and error is not None and "Dictionary mismatch" in error.why


def test_a_zstd_window_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for log, fits in ((27, True), (28, False)):
        parameters = zstandard.ZstdCompressionParameters(window_log=log)
        packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        path.write_bytes(packer.compress(TEXT[:1000]) + packer.flush())
        found, error = read(path, "zst")
        assert (found == TEXT[:1000], error is None) == (fits, fits)
    assert error is not None
    assert_facts(error.why, "window", "256 MiB", "128 MiB", "--long")


@pytest.mark.parametrize("compression", PACK)
def test_an_empty_file_has_no_chunks(tmp_path: Path, compression: str) -> None:
    (tmp_path / "a").touch()
    assert read(tmp_path / "a", compression) == (b"", None)


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with user_error(f"{tmp_path / 'missing'}: ", "No such file or directory", "check the path"):
        list(read_chunks(str(tmp_path / "missing"), ""))
    (tmp_path / "a").write_bytes(zst(b"text"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with user_error(f"{tmp_path / 'a'}: ", ".zst", "pip install zstandard"):
        list(read_chunks(str(tmp_path / "a"), "zst"))
