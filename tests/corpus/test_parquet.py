"""Parquet files and Hub datasets: every row once, in small batches, and corrupt data located."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.messages import assert_facts, user_error

from megatron_prealign.corpus import hub
from megatron_prealign.corpus.hub import HubName, parse_hub_name, read_hub_batches
from megatron_prealign.corpus.parquet import read_batches, row_groups, rows_of
from megatron_prealign.corpus.read_errors import ReadError

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install pyarrow)")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow has no parquet here")

_random = random.Random(0)
TEXTS = [("ab☃ " * _random.randrange(200))[: _random.randrange(1, 800)] for _ in range(1000)]
TEXTS[700] = "long " * 20_000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """1,000 rows in groups of 300, with an unused column and one inside two structs."""
    directory = tmp_path_factory.mktemp("parquet")
    nested = [None if n % 7 == 0 else {"other": n, "in": {"text": text}} for n, text in enumerate(TEXTS)]
    table = pyarrow.table({"id": range(1000), "text": TEXTS, "data": nested, "data.text": TEXTS[::-1]})
    parquet.write_table(
        table, directory / "a.parquet", row_group_size=300, compression="zstd", write_page_checksum=True
    )
    return str(directory / "a.parquet")


def read(batches: Iterator[tuple[bytes, int]], first_row: int = 0) -> dict[str, list[Any]]:
    """All values; checks the row numbers."""
    values: dict[str, list[Any]] = {}
    row = first_row
    for payload, following in batches:
        columns = rows_of(payload)
        for name, part in columns.items():
            assert len(part) == following - row > 0
            values.setdefault(name, []).extend(part)
        row = following
    return values


def test_row_groups(path: str) -> None:
    groups = row_groups(path)
    assert [(group.first_row, group.rows) for group in groups] == [(0, 300), (300, 300), (600, 300), (900, 100)]
    assert 0 < sum(group.disk_bytes for group in groups) < Path(path).stat().st_size


@pytest.mark.parametrize("batch_bytes", [1, 5000, 1 << 30])
def test_all_rows_in_order(path: str, batch_bytes: int) -> None:
    values = read(read_batches(path, ["text", "id"], 0, 1000, batch_bytes))
    assert values == {"text": TEXTS, "id": list(range(1000))}
    sizes = [len(payload) for payload, _ in read_batches(path, ["text"], 0, 1000, 5000)]
    # The Arrow framing takes a few hundred bytes; the one long document has its own batch.
    assert sorted(sizes)[-2] < 6000 and max(sizes) > 100_000 and len(sizes) > 50


@pytest.mark.parametrize(
    "first, stop", [(0, 1), (299, 301), (300, 600), (650, 5000), (999, 1000), (10, 10), (2000, 3000)]
)
def test_any_range_of_rows(path: str, first: int, stop: int) -> None:
    values = read(read_batches(path, ["text"], first, stop, 5000), first)
    assert values.get("text", []) == TEXTS[first:stop]


def test_fields_inside_structs(path: str) -> None:
    values = read(read_batches(path, ["data.in.text", "data.text", "data.other"], 100, 200, 5000), 100)
    assert list(values) == ["data.in.text", "data.text", "data.other"]
    assert values["data.in.text"] == [None if n % 7 == 0 else TEXTS[n] for n in range(100, 200)]
    assert values["data.other"] == [None if n % 7 == 0 else n for n in range(100, 200)]
    # A column with exactly this name takes precedence over a nested one.
    assert values["data.text"] == TEXTS[::-1][100:200]


@pytest.mark.parametrize("column", ["txt", "data.in.nothing", "text.more", "data.in.text.more", ""])
def test_a_missing_column(path: str, column: str) -> None:
    with pytest.raises(ReadError) as caught:
        list(read_batches(path, ["id", column], 0, 10, 100))
    assert caught.value.where == path
    assert_facts(
        caught.value.why, f"no column {column!r};", ": id, text, data.other, data.in.text, data.text;", "--text-key"
    )


def test_all_text_types(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    texts = ["ä", None, "", "𠮷"]
    types = [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.large_binary()]
    arrays = [pyarrow.array([text and text.encode() for text in texts]).cast(kind) for kind in types]
    arrays.append(pyarrow.array(texts).dictionary_encode())
    parquet.write_table(pyarrow.table(arrays, names=list("abcde")), path)
    assert read(read_batches(path, list("abcde"), 0, 4, 100)) == {name: texts for name in "abcde"}


def test_text_that_is_not_utf8_stays_bytes(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    values = [b"good", b"caf\xe9", None, "é".encode()]
    binary = pyarrow.array(values, pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, binary.buffers())
    parquet.write_table(pyarrow.table({"binary": binary, "text": text, "words": text.dictionary_encode()}), path)
    found = read(read_batches(path, ["binary", "text", "words"], 0, 4, 1000))
    assert found == {name: ["good", b"caf\xe9", None, "é"] for name in ("binary", "text", "words")}


def test_values_that_are_not_text(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"n": [1, None], "l": [["a"], []], "b": [True, False]}), path)
    found = read(read_batches(path, ["n", "l", "b"], 0, 2, 100))
    assert found == {"n": [1, None], "l": [["a"], []], "b": [True, False]}


@pytest.mark.parametrize("corruption", ["nothing", "start", "cut", "half the footer", "text", "pages"])
def test_corrupt_files(path: str, tmp_path: Path, corruption: str) -> None:
    data = Path(path).read_bytes()
    broken = tmp_path / "a.parquet"
    middle = len(data) // 2
    broken.write_bytes(
        {
            "nothing": b"",
            "start": data[:4],
            "cut": data[:middle],
            "half the footer": data[:-500] + data[-8:],
            "text": b'{"text": "wrongly named"}\n' * 100,
            "pages": data[:5000] + bytes(2000) + data[7000:],
        }[corruption]
    )
    where = f"{broken}:1" if corruption == "pages" else str(broken)
    with user_error(f"{where}: corrupt or truncated parquet data (", kind=ReadError):
        row_groups(str(broken))
        list(read_batches(str(broken), ["text", "data.in.text"], 0, 1000, 5000))


def test_rows_before_corrupt_data_are_read(path: str, tmp_path: Path) -> None:
    data = bytearray(Path(path).read_bytes())
    second = parquet.read_metadata(path).row_group(1).column(0).data_page_offset
    data[second + 50 : second + 150] = bytes(100)
    (tmp_path / "a.parquet").write_bytes(data)
    found: list[int] = []
    with user_error("a.parquet:301: corrupt", kind=ReadError):
        for payload, _ in read_batches(str(tmp_path / "a.parquet"), ["id"], 0, 1000, 1000):
            found += rows_of(payload)["id"]
    assert found == list(range(300))


def test_a_changed_byte_in_a_page(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["one", "two"]})
    parquet.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    path.write_bytes(path.read_bytes().replace(b"\3\0\0\0two", b"\3\0\0\0tvo"))
    with user_error("a.parquet:1: corrupt", kind=ReadError):
        list(read_batches(str(path), ["text"], 0, 2, 100))


def test_a_column_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"named": ["one"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"named", b"\xf9amed"))
    with user_error("a.parquet: corrupt", kind=ReadError):
        list(read_batches(str(path), ["text"], 0, 2, 100))


@pytest.mark.slow
def test_any_corruption_is_a_read_error(path: str, tmp_path: Path) -> None:
    data, broken, generator = Path(path).read_bytes(), tmp_path / "a.parquet", random.Random(3)
    rejected = 0
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(generator.choice((1, 20))):
            # Half of them in the footer, which describes everything.
            at = generator.randrange(len(data)) if generator.random() < 0.5 else -1 - generator.randrange(2000)
            changed[at] = generator.randrange(256)
        broken.write_bytes(changed)
        try:
            row_groups(str(broken))
            values = read(read_batches(str(broken), ["text", "data.in.text"], 0, 1000, 1 << 20))
            assert set(values) <= {"text", "data.in.text"}
        except ReadError as error:
            rejected += 1
            assert error.where.startswith(str(broken)) and "\n" not in str(error)
    assert rejected > 75


def test_a_missing_file(tmp_path: Path) -> None:
    with user_error("missing.parquet: ", "No such file"):
        row_groups(str(tmp_path / "missing.parquet"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:allenai/c4", HubName("allenai/c4", None, "train")),
        ("hf:allenai/c4,de:validation", HubName("allenai/c4", "de", "validation")),
        ("hf:./a directory:test", HubName("./a directory", None, "test")),
    ],
)
def test_hub_names(text: str, name: HubName) -> None:
    assert parse_hub_name(text) == name


def save_parquet(directory: Path) -> str:
    directory.mkdir()
    table = pyarrow.table({"id": range(300), "data": [{"text": text} for text in TEXTS[:300]]})
    parquet.write_table(table, directory / "train-00000.parquet")
    parquet.write_table(table.slice(0, 5), directory / "test-00000.parquet")
    return f"hf:{directory}"


def save_jsonl(directory: Path) -> str:
    directory.mkdir()
    for split, count in (("train", 300), ("test", 5)):
        lines = [json.dumps({"id": n, "data": {"text": text}}) + "\n" for n, text in enumerate(TEXTS[:count])]
        (directory / f"{split}.jsonl").write_text("".join(lines))
    return f"hf:{directory}"


def save_to_disk(directory: Path) -> str:
    import datasets

    rows = [{"id": n, "data": {"text": text}} for n, text in enumerate(TEXTS[:300])]
    train = datasets.Dataset.from_list(rows)
    datasets.DatasetDict(train=train, test=train.select(range(5))).save_to_disk(str(directory))
    return f"hf:{directory}"


@pytest.mark.parametrize("save", [save_parquet, save_jsonl, save_to_disk])
def test_datasets_in_local_directories(tmp_path: Path, save: Callable[[Path], str]) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed (pip install 'megatron-prealign[hub]')")
    name = save(tmp_path / "data")
    values = read(read_hub_batches(name, ["data.text", "id"], 0, 5000))
    assert values == {"data.text": TEXTS[:300], "id": list(range(300))}
    assert read(read_hub_batches(name, ["data.text"], 297, 5000), 297) == {"data.text": TEXTS[297:300]}
    assert read(read_hub_batches(f"{name}:test", ["id"], 0, 5000)) == {"id": [0, 1, 2, 3, 4]}
    with user_error(f"{name}: ", "no column 'txt'", ": id, data.text;", kind=ReadError):
        list(read_hub_batches(name, ["txt"], 0, 100))
    with user_error(f"{name}:dev: ", "directory", "hf:NAME[,CONFIG][:SPLIT]"):
        list(read_hub_batches(f"{name}:dev", ["txt"], 0, 100))


def test_missing_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    for name in (f"hf:{tmp_path}/missing", f"hf:{tmp_path}/empty"):
        with user_error(f"{name}: cannot open", "check name"):
            list(read_hub_batches(name, ["text"], 0, 100))


def test_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with user_error("hf:a/b: ", "datasets", "'megatron-prealign[hub]'"):
        list(read_hub_batches("hf:a/b", ["text"], 0, 100))


def test_a_connection_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")

    def rows() -> Iterator[dict[str, str]]:
        for text in TEXTS[:200]:
            yield {"text": text}
        raise ConnectionError("the far end\nhung up")

    broken = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(hub, "_open", lambda name: broken)
    found: list[str] = []
    with user_error("hf:a/b: ", "ConnectionError: the far end hung up", kind=ReadError):
        for payload, _ in read_hub_batches("hf:a/b", ["text"], 0, 500):
            found += rows_of(payload)["text"]
    assert len(found) > 100 and TEXTS[: len(found)] == found
