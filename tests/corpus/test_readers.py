"""Reading documents: formats, locations, blocks, and every kind of broken input."""

import bz2
import gzip
import json
import pickle
import random
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from support.marks import slow_except
from support.messages import assert_facts, user_error

from megatron_prealign.corpus import parquet as parquet_module
from megatron_prealign.corpus import read_errors
from megatron_prealign.corpus.blocks import Block, Extent, Limits, read_blocks, shard_extents
from megatron_prealign.corpus.inputs import resolve_inputs
from megatron_prealign.corpus.read_errors import MAX_LISTED, Problem, Problems, ReadError
from megatron_prealign.corpus.readers import Fields, parse_block, read_documents

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(PACK.get(path.suffix, bytes)(data))
    return path


def read(*paths: Path, keys: tuple[str, ...] = ("text",), limits: Limits | None = None) -> list[tuple[str, str]]:
    return list(read_documents(resolve_inputs(paths), keys, limits=limits))


def read_around(*paths: Path, limits: Limits | None = None) -> tuple[list[str], list[Problem]]:
    """The texts and the skipped documents."""
    problems = Problems()
    found = [
        text for text, _ in read_documents(resolve_inputs(paths), on_error="skip", problems=problems, limits=limits)
    ]
    assert problems.count == len(problems.listed)
    return found, problems.listed


def blocks_of(path: Path, limits: Limits, extent: Extent | None = None, position: int = 0) -> list[Block]:
    (source,) = resolve_inputs([path])
    return list(read_blocks(source, ("text",), limits, extent or Extent(), position))


@pytest.mark.parametrize("ending", PACK)
def test_jsonl(tmp_path: Path, ending: str) -> None:
    data = '\ufeff{"text": "one"}\r\n\n{"text": "zwei\\nü", "id": 3}\n{"text": "\u2028 \\r", "x": 1}\n{"text": "4"}'
    path = write(tmp_path / f"a.jsonl{ending}", data.encode())
    assert read(path) == [("one", f"{path}:1"), ("zwei\nü", f"{path}:3"), ("4", f"{path}:5")]
    assert read_around(path)[1] == [Problem(f"{path}:4", "empty document")]


@pytest.mark.parametrize("ending", PACK)
def test_txt_documents_are_separated_by_blank_lines(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.txt{ending}", b"\xef\xbb\xbf\n\none\r\n two \r\n \t\r\n\nthree\n")
    assert read(path) == [("one\n two ", f"{path}:3"), ("three", f"{path}:7")]


def parquet(path: Path, rows: list[object], **options: object) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, **options)  # type: ignore[arg-type]
    return path


def test_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["one", None, "", "vier"], row_group_size=3)
    assert read_around(path) == (
        ["one", "vier"],
        [
            Problem(f"{path}:row 2", "value of 'text' is a JSON null, expected a string"),
            Problem(f"{path}:row 3", "empty document"),
        ],
    )
    with user_error(f"{path}:row 2: ", "'text'", "null", kind=ReadError):
        read(path)
    nested = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"data": [{"text": "deep", "n": 1}], "id": [1]}), nested)
    assert read(nested, keys=("data.text",)) == [("deep", f"{nested}:row 1")]
    with user_error("no column 'text'", ": data.text, data.n, id;", kind=ReadError):
        read(nested)
    assert read_around(parquet(tmp_path / "none.parquet", [])) == (
        [],
        [Problem(f"{tmp_path}/none.parquet", "no rows, expected at least one document")],
    )


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with user_error(tmp_path / "a.parquet", "2 columns", "'text'", kind=ReadError):
        read(tmp_path / "a.parquet")


def test_a_long_row_is_a_bad_document(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", ["x" * 200, "ü" * 101, "ü" * 100, "x" * 201])
    texts, skipped = read_around(path, limits=Limits(document_bytes=200))
    assert texts == ["x" * 200, "ü" * 100]
    assert [problem.where for problem in skipped] == [f"{path}:row 2", f"{path}:row 4"]
    assert all("longer than 0.000190735 MiB" in problem.why for problem in skipped)


@pytest.mark.parametrize("sizes", [(0, 0, 0), (10**9, 0, 5), (-7, 3, 2), None])
def test_no_row_is_lost_or_duplicated_by_wrong_footer_sizes(
    tmp_path: Path, sizes: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source,) = resolve_inputs([parquet(tmp_path / "a.parquet", ["a", "b", "c"], row_group_size=1)])
    if sizes is None:
        # Groups start exactly where shards do.
        sizes = (source.bytes // 3, source.bytes * 2 // 3 - source.bytes // 3, 1)
    groups = [parquet_module.RowGroup(n, 1, size) for n, size in enumerate(sizes)]
    monkeypatch.setattr(parquet_module, "row_groups", lambda path: groups)
    rows = []
    for number in (1, 2, 3):
        for extent in shard_extents([source], (number, 3)):
            rows += list(range(extent.start, extent.stop or 0)) if extent is not None else []
    assert sorted(rows) == [0, 1, 2]


@pytest.mark.parametrize("ending", ["jsonl", "txt", "jsonl.gz", "txt.zst", "txt.bz2", "parquet"])
@pytest.mark.parametrize("block_bytes", slow_except([1, 40, 300, 10**9], 40, 10**9))
def test_blocks_contain_complete_documents_and_reading_can_resume_after_any(
    tmp_path: Path, ending: str, block_bytes: int
) -> None:
    generator = random.Random(block_bytes)
    texts = [f"first line {n}\nsecond line" + "x" * generator.randrange(200) for n in range(50)]
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet(path, list(texts), row_group_size=7)
    else:
        lines = [json.dumps({"text": text}) + "\n" if "json" in ending else text + "\n\n" for text in texts]
        write(path, "".join(lines).encode())
    limits = Limits(block_bytes=block_bytes)
    blocks = blocks_of(path, limits)
    parsed = [parse_block(block, Fields(), limits) for block in blocks]
    assert [text for found in parsed for text in found.texts[0]] == texts
    assert all(not found.problems for found in parsed)
    assert ending == "parquet" or sum(block.disk_bytes for block in blocks) == path.stat().st_size
    # Resuming at any position yields the remaining documents; except for tables, in the same blocks.
    for number in range(0, len(blocks), max(len(blocks) // 20, 1)):
        rest = blocks_of(path, limits, position=blocks[number].next_position)
        assert ending == "parquet" or rest == blocks[number + 1 :]
        after = [text for found in parsed[number + 1 :] for text in found.texts[0]]
        assert [text for block in rest for text in parse_block(block, Fields(), limits).texts[0]] == after
    numbers = [int(where.rpartition(":")[2].removeprefix("row ")) for _, where in read(path, limits=limits)]
    step = {"parquet": 1, "txt": 3}.get(ending.partition(".")[0], 1)
    assert numbers == list(range(1, 50 * step + 1, step))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 500])
def test_shards_are_a_partition_in_order(tmp_path: Path, count: int) -> None:
    generator = random.Random(1)
    paths, texts = [], []
    for name in ("a.jsonl", "b.txt.gz", "c.parquet", "d.jsonl", "e.txt", "f.jsonl.zst"):
        some = [f"{name} {n} " + "x" * generator.randrange(90) for n in range(generator.randrange(1, 30))]
        path = tmp_path / name
        if "parquet" in name:
            parquet(path, list(some), row_group_size=4)
        else:
            write(
                path, "".join((json.dumps({"text": t}) + "\n") if "json" in name else t + "\n\n" for t in some).encode()
            )
        paths.append(path)
        texts += some
    # A file without a trailing line break that ends in one long line.
    paths[3].write_bytes(paths[3].read_bytes() + json.dumps({"text": "y" * 3000}).encode())
    texts.insert(texts.index(next(text for text in texts if text.startswith("e.txt"))), "y" * 3000)
    sources = resolve_inputs(paths)
    limits = Limits(block_bytes=64)
    found = []
    for number in range(1, count + 1):
        for source, extent in zip(sources, shard_extents(sources, (number, count)), strict=True):
            if extent is not None:
                for block in read_blocks(source, ("text",), limits, extent):
                    found += parse_block(block, Fields(), limits).texts[0]
    assert found == texts


def test_shards_leave_no_byte_between_them(tmp_path: Path) -> None:
    sources = resolve_inputs([write(tmp_path / "a.jsonl", b"x" * 1000)])
    for count in (3, 7, 999):
        parts = [
            extent for number in range(1, count + 1) for extent in shard_extents(sources, (number, count)) if extent
        ]
        assert [extent.stop for extent in parts[:-1]] == [extent.start for extent in parts[1:]]
        assert (parts[0].start, parts[-1].stop) == (0, 1000)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_every_undivided_file_belongs_to_one_shard(tmp_path: Path, count: int) -> None:
    # Equal sizes: with two and four shards, files and shards start at the same bytes.
    sources = resolve_inputs([write(tmp_path / f"{n}.txt", b"text") for n in range(4)])
    found = [
        source.name
        for number in range(1, count + 1)
        for source, extent in zip(sources, shard_extents(sources, (number, count)), strict=True)
        if extent is not None
    ]
    assert found == [source.name for source in sources]


def test_byte_order_marks_inside_a_text_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffabc\ufeff\ufeffd".encode())
    for block_bytes in (3, 1 << 20):
        assert read(path, limits=Limits(block_bytes=block_bytes))[0][0] == "abc\ufeff\ufeffd"


BAD_LINES = [
    (b'{"text": "x"', "invalid JSON"),
    (b"plain words", "invalid JSON"),
    (b'["text"]', "a JSON array, expected an object"),
    (b"null", "a JSON null, expected an object"),
    (b'{"body": "x", "id": 1}', "no key 'text'; keys: body, id; select one with --text-key"),
    (b"{}", "keys: none;"),
    (b'{"text": 5}', "'text' is a JSON number, expected a string"),
    (b'{"text": null}', "'text' is a JSON null, expected a string"),
    (b'{"text": true}', "'text' is a JSON boolean"),
    (b'{"text": "half \\ud83d", "score": NaN}', "invalid JSON ('utf-8' codec"),
    (b'{"text": "x", "score": Infinit}', "invalid JSON ("),
    (b"NaN", "a JSON number, expected an object"),
    (b'{"text": "caf\xe9"}', "not UTF-8: byte 0xe9 at byte 14; convert the file to UTF-8"),
    (b'{"text": "half \\ud83d"}', "invalid JSON ("),
    (b'{"text": "\\udc00"}', "surrogate"),
    (b'{"text": "\xed\xa0\x80"}', "not UTF-8: byte 0xed"),
    ('{"text": "ü"}'.encode("utf-16"), "not UTF-8: byte 0xff at byte 1"),
    (b'{"text": "' + b"x" * 300 + b'"}', "longer than 0.000190735 MiB"),
]


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize(("line", "why"), BAD_LINES)
def test_bad_lines_stop_or_are_skipped(tmp_path: Path, line: bytes, why: str, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}", b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    limits = Limits(document_bytes=200)
    with user_error(f"{path}:2: ", why):
        read(path, limits=limits)
    texts, skipped = read_around(path, limits=limits)
    assert texts == ["one", "three"]
    assert [problem.where for problem in skipped] == [f"{path}:2"]
    assert why in skipped[0].why


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "txt", "txt.bz2"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_an_overlong_document_is_skipped_in_little_memory(tmp_path: Path, ending: str, place: str) -> None:
    json_lines = "json" in ending
    short = [b'{"text": "%d"}\n' % n if json_lines else b"%d\n\n" % n for n in range(40)]
    # Longer than many blocks and than a partial read of a line; as text it also has lines.
    size = 600_000 if ending == "jsonl" else 5000
    long = b'{"text": "' + b"y" * size + b'"}\n' if json_lines else b"y" * 700 + b"\nz" * 3000 + b"\n\n"
    at = {"first": 0, "middle": 20, "last": 40}[place]
    path = write(tmp_path / f"a.{ending}", b"".join([*short[:at], long, *short[at:]]))
    limits = Limits(block_bytes=64, document_bytes=1000)
    texts, skipped = read_around(path, limits=limits)
    assert texts == [str(n) for n in range(40)]
    assert [problem.where for problem in skipped] == [f"{path}:{(at if json_lines else 2 * at) + 1}"]
    assert "longer than" in skipped[0].why
    # Line counting continues after it.
    wheres = [where for _, where in read_documents(resolve_inputs([path]), ("text",), "skip", Problems(), limits)]
    lines = [n + (n >= at) if json_lines else 2 * n + (3002 if n >= at else 0) for n in range(40)]
    assert wheres == [f"{path}:{line + 1}" for line in lines]
    for block in blocks_of(path, limits):
        assert not isinstance(block.content, bytes) or len(block.content) < 1200


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_byte_order_mark_before_an_overlong_document(tmp_path: Path, ending: str) -> None:
    data = b'\xef\xbb\xbf{"text": "one"}\n' + b"y" * 600_000 + b'\n{"text": "two"}\n'
    path = write(tmp_path / f"a.{ending}", data)
    texts, skipped = read_around(path, limits=Limits(block_bytes=300, document_bytes=1000))
    assert texts == ["one", "two"] and [problem.where for problem in skipped] == [f"{path}:2"]


@pytest.mark.parametrize("end", [b"", b"\n", b'\n{"text": "next"}'])
@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
@pytest.mark.parametrize("block_bytes", [16, 99, 1 << 20])
def test_maximum_document_length(tmp_path: Path, block_bytes: int, ending: str, end: bytes) -> None:
    limits = Limits(block_bytes=block_bytes, document_bytes=100)
    for length, is_good in ((88, True), (89, False)):
        path = write(tmp_path / f"{length}.{ending}", b'{"text": "' + b"x" * length + b'"}' + end)
        texts, skipped = read_around(path, limits=limits)
        assert texts[:1] == (["x" * length] if is_good else ["next"][: len(end) // 2])
        assert [problem.where for problem in skipped] == ([] if is_good else [f"{path}:1"])


@pytest.mark.slow
def test_a_file_with_only_bad_lines(tmp_path: Path) -> None:
    # Recounting the bytes before each line would take minutes.
    path = write(tmp_path / "a.jsonl", b'{"text": ""}\n' * 150 + b"x\n" * 60_000)
    (block,) = blocks_of(path, Limits())
    found = parse_block(block, Fields(), Limits())
    assert found.lines == 60_150 and len(found.problems) + found.unlisted == 60_150
    # Enough for the list of a run, and the first problem that can stop it.
    assert [number for number, _, _ in found.problems] == [*range(MAX_LISTED), 150]
    assert found.problems[150 - 50][1] == 150 * 13
    problems = Problems()
    assert not list(read_documents(resolve_inputs([path]), on_error="skip", problems=problems))
    assert (problems.count, len(problems.listed)) == (60_150, MAX_LISTED)
    with user_error(f"{path}:151: invalid JSON", kind=ReadError):
        read(path)


def test_bytes_of_bad_lines(tmp_path: Path) -> None:
    lines = [b"bad", b'{"text": "one"}', b"", b"worse", b'{"text": ""}', b"y" * 600_000]
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + b"\n".join(lines))
    found = [
        path.read_bytes()[byte : byte + 5]
        for block in blocks_of(path, Limits(document_bytes=100))
        for _, byte, _ in parse_block(block, Fields(), Limits(document_bytes=100)).problems
    ]
    assert found == [b"bad\n{", b"worse", b'{"tex', b"yyyyy"]


@pytest.mark.parametrize("ending", ["jsonl.gz", "txt"])
def test_an_overlong_line_is_not_kept_in_memory(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.{ending}", b"y" * 20_000_000)
    tracemalloc.start()
    try:
        blocks = blocks_of(path, Limits(block_bytes=1 << 16, document_bytes=1 << 17))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(blocks) == 1 and peak < 2_000_000


def test_nan_and_infinity(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"text": "one", "score": NaN}\n{"text": "two", "score": [-Infinity]}\n')
    assert read(path) == [("one", f"{path}:1"), ("two", f"{path}:2")]


def test_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"body": "x", "meta": {"title": "T", "n": {"m": "deep"}}, "a.b": "dot"}\n')
    assert read(path, keys=("body",))[0][0] == "x"
    assert read(path, keys=("meta.title",))[0][0] == "T"
    assert read(path, keys=("meta.n.m",))[0][0] == "deep"
    assert read(path, keys=("a.b",))[0][0] == "dot"
    assert read(path, keys=("meta.title", "body"))[0][0] == "T\nx"
    with user_error(f"{path}:1: ", "no key 'meta.m'", ": title, n;"):
        read(path, keys=("meta.m",))
    with user_error(f"{path}:1: ", "no key 'body.x'", ": body, meta, a.b;"):
        read(path, keys=("body.x",))


def test_fields_of_a_block() -> None:
    lines = [
        {"a": "one", "b": "eins", "l": "en"},
        {"a": "", "b": "zwei", "l": " de "},
        {"a": " ", "b": "\n", "l": "de"},
        {"a": "four", "b": "vier", "l": ""},
        {"a": "five", "b": "fünf"},
        {"a": "six", "b": "sechs", "l": 6},
    ]
    block = Block("lines", "\n".join(map(json.dumps, lines)).encode(), 1, 0)
    found = parse_block(block, Fields(("a", "b"), None, "l"), Limits())
    assert found.texts == [["one", ""], ["eins", "zwei"]]
    assert (found.languages, found.numbers, found.lines) == (["en", "de"], [0, 1], 6)
    expected = [(2, "empty document"), (3, "value of 'l' is ''"), (4, "no key 'l'"), (5, "value of 'l' is 6")]
    for (number, _, why), (expected_number, fact) in zip(found.problems, expected, strict=True):
        assert number == expected_number
        assert_facts(why, fact)
    joined = parse_block(block, Fields(("a", "b"), " | "), Limits())
    assert joined.texts == [["one | eins", "zwei", "four | vier", "five | fünf", "six | sechs"]]


def test_invalid_utf8_in_a_text_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\n\ntwo\n\xff\xfe\n\nthree\n")
    with user_error(f"{path}:3: not UTF-8", "byte 0xff at byte 5"):
        read(path)
    assert read_around(path)[0] == ["one", "three"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
def test_an_empty_file_is_a_problem(tmp_path: Path, name: str) -> None:
    empty, good = write(tmp_path / name, b""), write(tmp_path / "b.txt.gz", b"text")
    with user_error(f"{empty}: empty file"):
        read(empty, good)
    assert read_around(empty, good) == (["text"], [Problem(str(empty), "empty file, expected at least one document")])
    (block,) = blocks_of(empty, Limits())
    assert blocks_of(empty, Limits(), position=block.next_position) == []


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl.gz", "txt.zst", "txt.bz2"])
@pytest.mark.parametrize("corruption", ["cut", "flipped"])
def test_corrupt_archives(tmp_path: Path, corruption: str, ending: str) -> None:
    # Hardly compressible, so that the middle of the file is also the middle of the text.
    generator = random.Random(0)
    texts = [str(generator.getrandbits(300)) for _ in range(40_000)]
    lines = [json.dumps({"text": text}) + "\n" if "json" in ending else text + "\n\n" for text in texts]
    path = write(tmp_path / f"a.{ending}", "".join(lines).encode())
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    path.write_bytes(data[:middle] if corruption == "cut" else data[:middle] + bytes(50) + data[middle + 50 :])
    # gzip notices the change only at the end; JSON parsing fails before that.
    with user_error(f"{path}:") as caught:
        read(path)
    assert re.search(rf"a\.{ending}:\d+: .*(truncated|corrupt|invalid JSON)", str(caught.value))
    problems = Problems()
    found = [text for text, _ in read_documents(resolve_inputs([path]), ("text",), "skip", problems)]
    # Data before the corruption is kept, but no partial document.
    assert len(found) > 1000 and found[:1000] == texts[:1000]
    assert problems.count > 1 or found == texts[: len(found)]


def test_problems_list_the_first_and_count_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_errors, "MAX_LISTED", 3)
    problems = Problems()
    for n in range(6):
        problems.add(f"a:{n}", "x")
    assert problems.count == 6
    assert [problem.where for problem in problems.listed] == ["a:0", "a:1", "a:2"]


def test_read_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ReadError("a.txt:3", "broken")))
    assert (str(error), error.where, error.why) == ("a.txt:3: broken", "a.txt:3", "broken")
